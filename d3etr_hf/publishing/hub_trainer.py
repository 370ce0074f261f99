"""The part of the trainer that publishes: Transformers' hub options, with a measured card and safe files only."""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from d3etr_hf.errors import PublishError
from d3etr_hf.files import write_json, write_whole
from d3etr_hf.models.loading import load_detector
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.licenses import licenses_of, require_license
from d3etr_hf.publishing.privacy import write_published_json
from d3etr_hf.publishing.publish import prepare, resume_command
from d3etr_hf.publishing.run_folder import PublishedRun, hash_of_weights, links_to_hub, read_json
from d3etr_hf.publishing.upload import (
    CHECKPOINT_FILES,
    MODEL_FILES,
    PUBLISHED_FILES,
    explain,
    upload,
    upload_in_background,
)
from d3etr_hf.runs.description import describe_run
from d3etr_hf.runs.environment import describe_environment
from d3etr_hf.runs.output_folder import (
    CONFIGURATION,
    ENVIRONMENT,
    HISTORY,
    LAUNCH,
    RESULTS,
    describe_launch,
)
from d3etr_hf.training.processes import on_main_process
from d3etr_hf.training.trainer import DistillationTrainer

logger = logging.get_logger(__name__)


class D3etrTrainer(DistillationTrainer):
    """`DistillationTrainer` whose `push_to_hub`, `hub_strategy` and model card are fit for a distilled detector.

    Transformers would upload the whole output folder, its pickled arguments and the optimizer's state among it, and
    writes a card that knows no average precision; so these methods take its place where the others call them.
    """

    # results

    def record_results(self, metrics: dict[str, float], spent: Mapping[str, float] | None = None) -> dict:
        """Write what the run came to beside the saved model: `results.json` and its history.

        Args:
            metrics: from `evaluate()`.
            spent: `seconds` of training and the like; None where they were not measured.

        Returns:
            The results: the metrics without `eval_`, parameters and optimizer steps.
        """
        results = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        results |= {
            "parameters": sum(parameter.numel() for parameter in self.model.to_stock().parameters()),
            "steps": self.state.global_step,
        } | (spent or {})
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            write_published_json(folder / HISTORY, self.state.log_history)
            results["weights"] = hash_of_weights(folder)  # by which a card knows whose results these are
            write_json(folder / RESULTS, results)
        return results

    def _record_afresh(self, metrics: dict[str, float]) -> None:
        """The results, and what a script would have written when it started: nothing of an earlier run stays."""
        if self.is_world_process_zero():
            folder, teacher = Path(self.args.output_dir), self._name_of_teacher()
            links = links_to_hub(teacher=teacher, started_from=self.model.name_or_path)
            write_json(folder / LAUNCH, describe_launch(self.args))
            write_json(folder / ENVIRONMENT, describe_environment() | {"links": links})
            write_whole(folder / CONFIGURATION, describe_run(self.args))
        self.record_results(metrics)

    def _name_of_teacher(self) -> str | None:
        return None if self.teacher is None else self.teacher.name

    def _has_new_results(self) -> bool:
        """Whether the saved model is another than was evaluated last; the main process decides for all."""
        recorded = None
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            results = read_json(folder / RESULTS)
            recorded = results is not None and results.get("weights") == hash_of_weights(folder)
        return not broadcast_object_list([recorded])[0]

    def _split_for_card(self):
        """The validation split that a card reports: the one there is, or the first of several.

        Raises:
            PublishError: there is none.
        """
        splits = self.eval_dataset
        if splits is None or self.train_dataset is None:
            raise PublishError("a model card needs the trainer's train_dataset and eval_dataset: give both")
        return next(iter(splits.values())) if isinstance(splits, dict) else splits

    # publishing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in Transformers, but a Hub that does not answer keeps no run from starting: the upload tries again."""
        try:
            super().init_hf_repo(token, private)
        # whatever the Hub or its client comes up with
        except Exception as error:
            self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            self.push_in_progress = None
            logger.warning(
                f"the repository {self.hub_model_id} could not be made on the Hub: {explain(error)}. Training goes "
                "on; the upload at its end makes it"
            )

    def save_without_pushing(self) -> None:
        """Save the student; with `push_to_hub` Trainer's own `save_model` would push it at once, without results."""
        self.save_model(_internal_call=True)

    def create_model_card(
        self,
        license: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
        compare: list[str] | None = None,
    ) -> None:
        """Measure what is not measured yet, and write the card with its pictures into the output folder.

        Args:
            license, finetuned_from, dataset: as in Transformers: the Hub's identifier of the licence, the Hub ids of
                the teacher and of the data set.
            compare: further detectors for the results table, each as "title=folder".

        Raises:
            PublishError: the run was not evaluated.
        """
        if self.is_world_process_zero():
            card = self._card_arguments(license, finetuned_from, dataset, compare)
            prepare(self._published_run(), card, self.hub_model_id)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card,
    ) -> str | Future | None:
        """Save the student, write its card and upload both; see `create_model_card` for `card`.

        Returns:
            The address of the commit, or a future with `blocking=False`; None on all processes but the main one.

        Raises:
            HubError: the upload failed; the message names the command that resumes it. Nothing local is lost.
            PublishError, PrivacyError: there is nothing to publish, or no licence, or a file holds a secret.
        """
        arguments = self._card_arguments(**card)
        if arguments.license is None:
            on_main_process(lambda: require_license(Path(self.args.output_dir), self._licenses_of_sources()))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_without_pushing()
        split = self._split_for_card()
        if self._has_new_results():
            self._record_afresh(self.evaluate(split))
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        folder = Path(self.args.output_dir)
        push = {
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
        }
        if not blocking:
            return upload_in_background(folder, PUBLISHED_FILES, self.hub_model_id, **push)
        private = self.args.hub_private_repo if private is None else private
        command = resume_command(folder, self.hub_model_id, arguments, private, push["revision"])
        return upload(folder, self.hub_model_id, command, private=private, **push)

    def _licenses_of_sources(self) -> dict[str, str]:
        return licenses_of(teacher=self._name_of_teacher(), started_from=self.model.name_or_path)

    @staticmethod
    def _card_arguments(license=None, finetuned_from=None, dataset=None, compare=None) -> CardArguments:
        """`create_model_card`'s arguments; any other is refused."""
        return CardArguments(license, finetuned_from, dataset, compare or [])

    def _published_run(self) -> PublishedRun:
        """What lies in the output folder: the live model may be in another precision."""
        return PublishedRun(
            Path(self.args.output_dir),
            load_detector(self.args.output_dir, "student"),
            self.train_dataset,
            self._split_for_card(),
            None if self.teacher is None else self.teacher.detector,
            self._name_of_teacher(),
            self.teacher_processing_class,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in Transformers, in the background at every save, but safe files only: no optimizer, no pickle."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, message = Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}"
        uploads = [(MODEL_FILES, None, message)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            uploads.append((CHECKPOINT_FILES, place, f"{message}, checkpoint"))
            logger.warning_once(
                "checkpoints are pushed without the optimizer's state, which is a pickle: a run can go on exactly "
                "from the local checkpoint only"
            )
        jobs = [
            upload_in_background(
                folder,
                files,
                self.hub_model_id,
                path_in_repo=place,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                commit_message=text,
            )
            for files, place, text in uploads
        ]
        if under_way:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
