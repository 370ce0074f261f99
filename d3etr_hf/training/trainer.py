"""`DistillationTrainer`: Transformers' Trainer with a teacher, a second query group and COCO evaluation."""

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import EvalPrediction

from d3etr_hf.data import DetectionCollator, DetectionDataset
from d3etr_hf.data.sampling import TrainingSampler
from d3etr_hf.errors import EvaluationError, NonFiniteCostError, NonFiniteLossError, UnsupportedOptionError
from d3etr_hf.evaluation import average_precision_of, detect
from d3etr_hf.models.detector import ADAPTERS, BACKBONE, Detector
from d3etr_hf.models.other_detector import OtherDetector
from d3etr_hf.outputs import DetectorOutput, GroupRequest, Targets
from d3etr_hf.training.checks import (
    check_data,
    check_images,
    check_models,
    check_use_of_data,
    named_datasets,
    terms_in_common,
)
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.early_stopping import EarlyStopping
from d3etr_hf.training.half_precision import SkippedSteps
from d3etr_hf.training.instability import Instability, Visit, shares_of
from d3etr_hf.training.launch_checks import check_launch
from d3etr_hf.training.non_finite import NonFiniteGuard
from d3etr_hf.training.object_counts import warn_of_more_objects
from d3etr_hf.training.objective import D3etrObjective, Shares
from d3etr_hf.training.optimization import keeps_running_statistics, parameter_groups, single_drop
from d3etr_hf.training.progress import show_progress
from d3etr_hf.training.resumable_trainer import ResumableTrainer
from d3etr_hf.training.sampling import FollowEpochs, training_sampler
from d3etr_hf.training.step_queries import StepQueries, attach_query_adapters
from d3etr_hf.training.stopping import GracefulStop, start_worker
from d3etr_hf.training.teacher import Teacher, check_image_processors, teacher_pixels
from d3etr_hf.training.teacher_cache import TeacherCache
from d3etr_hf.training.term_log import StartAfresh, TermLog
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from d3etr_hf.training.unlabeled import is_labeled
from d3etr_hf.training.weight_average import WeightAverage


class DistillationTrainer(ResumableTrainer):
    """Trains a detector by D3ETR, or plainly when the options need no teacher.

    Args:
        model: the student, a `Detector` of any family.
        args: `D3etrTrainingArguments`.
        teacher: a `Detector` of any family, an `OtherDetector`, or None. It is moved, frozen and kept out of all that
            is saved.
        teacher_processing_class: the teacher's image processor. Where it makes other pixels than `processing_class`
            the training data must hold them, see `load_splits`.
        train_dataset, eval_dataset: `DetectionDataset`s with a transform; evaluation reads the data set's own ground
            truth.
        processing_class: the image processor that is saved with the student.
        trainer_options: everything else that `Trainer` takes, but `model_init` and `compute_loss_func`.

    Raises:
        IncompatibleTeacherError: the teacher cannot teach this student as the options say.
        UnsupportedOptionError, IncompatibleDataError, ImageSizeError: see there.
    """

    train_dataset: DetectionDataset
    eval_dataset: DetectionDataset
    teacher: Teacher | None
    objective: D3etrObjective
    queries: StepQueries
    # what the optimizer was built with beside its groups; None of one that was given
    optimizer_options: dict | None = None
    # None unless it is logged
    instability: Instability | None = None

    def __init__(
        self,
        model: Detector,
        args: D3etrTrainingArguments,
        teacher: Detector | OtherDetector | None = None,
        teacher_processing_class: BaseImageProcessor | None = None,
        **trainer_options,
    ):
        for name in ("model_init", "compute_loss_func"):
            if trainer_options.get(name) is not None:
                raise UnsupportedOptionError(f"{name} is not supported: the loss and query groups are this trainer's")
        check_models(model, teacher, args)
        data, of_student = trainer_options.get("train_dataset"), trainer_options.get("processing_class")
        given = named_datasets(data, trainer_options.get("eval_dataset"))
        check_data(model, of_student, given)
        warn_of_more_objects(model, teacher, given)
        own_metrics = trainer_options.get("compute_metrics") is not None
        check_use_of_data(args, model.class_names, data, trainer_options.get("eval_dataset"), own_metrics)
        aligned = None
        if teacher is not None:
            aligned = Teacher(teacher, model.class_names, model.decoder_depth, args.layer_map)
        # what is learned from whom, without what this teacher does not have
        self.distillation = self._whole_distillation = terms_in_common(args.distillation, teacher)
        if aligned is not None and runs_teacher(aligned, self.distillation):
            check_image_processors(of_student, teacher_processing_class, data)
            check_images(teacher, teacher_processing_class, {"train_dataset": data}, "teacher")
        if args.backbone_learning_rate == 0:
            model.freeze_part(BACKBONE)
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = keeps_running_statistics(model)
        trainer_options.setdefault("data_collator", DetectionCollator())
        trainer_options.setdefault("compute_metrics", self._average_precision)
        super().__init__(model=model, args=args, **trainer_options)
        check_launch(self.accelerator, args)
        show_progress(self)
        # the loss is already divided by what the whole step holds, accumulated batches included
        self.loss_is_scaled_for_ga = True
        self.teacher = None if aligned is None else aligned.to(self.args.device)
        self.teacher_processing_class = teacher_processing_class
        # after Trainer has set the seed: learned queries are drawn
        attach_query_adapters(model, self.teacher, self.distillation)
        self.criterion = self.model.criterion()
        self._prepare_objective()
        self.teacher_cache = self._make_teacher_cache()
        self._add_callbacks()
        if args.ema_decay is not None:  # after those that undo what a skipped step has done
            self.weight_average = WeightAverage(model, args.ema_decay, args.ema_warmup_steps, ADAPTERS)
            self.add_callback(self.weight_average)
        self._asked_to_stop: torch.Tensor
        self._evaluated_dataset = None

    def _prepare_objective(self) -> None:
        """For the options that hold now."""
        teacher_criterion = None if self.teacher is None else self.teacher.criterion
        self.objective = D3etrObjective(self.distillation, self.criterion, teacher_criterion, self._skips_steps)
        if self.args.log_instability and self.train_dataset is not None:
            self.objective.partners = {}
            data = self.train_dataset
            images = data.trained_images if isinstance(data, DetectionDataset) else len(data)
            self.instability = self.instability or Instability(images)
        self._runs_teacher = self.teacher is not None and runs_teacher(self.teacher, self.distillation)
        self.queries = StepQueries(self.model, self.teacher, self.distillation, self.args.seed)

    def _follow_schedule(self) -> None:
        """Set what of the distillation is on in the step that begins."""
        now = self.args.schedule.at(self._whole_distillation, self.state.global_step, self.state.max_steps)
        if now != self.distillation:
            self.distillation = now
            self._prepare_objective()

    def _make_teacher_cache(self) -> TeacherCache | None:
        """Where the teacher's outputs are kept; None where they are not."""
        if self.args.teacher_cache is None:
            return None
        if not self._runs_teacher:
            raise UnsupportedOptionError("teacher_cache: these options never run a teacher; leave it out")
        if weights := [f"{name}_weight" for name in self.distillation.memory_methods]:
            raise UnsupportedOptionError(
                f"teacher_cache keeps no encoder memory: leave it out, or set {', '.join(weights)} to 0"
            )
        if self.distillation.shared_groups:
            raise UnsupportedOptionError(
                "teacher_cache keeps nothing of queries that are drawn anew: leave it out, or set shared_query_weight "
                "to 0"
            )
        cache = TeacherCache(
            self.teacher,
            self.args.teacher_cache,
            self._maps,
            self.accelerator.autocast,
            self.accelerator.mixed_precision,
        )
        if self.train_dataset is not None:
            cache.prepare(self.train_dataset)
        return cache

    @property
    def _maps(self) -> GroupRequest:
        """Which maps, and what else that is compared, teacher and student return."""
        options = self.distillation
        maps = options.reads_self_attention, options.reads_cross_attention
        return GroupRequest({}, *maps, memory=bool(options.memory_methods), hidden_states=options.reads_hidden_states)

    def _add_callbacks(self) -> None:
        self.guard = NonFiniteGuard(self)
        self.skipped_steps = SkippedSteps(self.accelerator, self.guard.undo)
        self._term_log, self._norm_log, self._change_log = self._logs = tuple(
            TermLog(self._average, self._of_all) for _ in range(3)
        )
        self._epochs, self.stop = FollowEpochs(), GracefulStop(self.accelerator.num_processes)
        for callback in (
            self.guard,
            self.skipped_steps,
            StartAfresh(*self._logs),
            self._epochs,
            self.stop,
        ):
            self.add_callback(callback)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience))

    # data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TrainingSampler:
        """Instead of Trainer's: what is drawn for an image is known from seed, epoch and image alone."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._epochs.sampler = training_sampler(self.args, self.accelerator, dataset, self._train_batch_size)
        return self._epochs.sampler

    def num_examples(self, dataloader: DataLoader) -> int:
        """Images of an epoch, those without labels among them."""
        dataset = dataloader.dataset
        return dataset.images_of_epoch if isinstance(dataset, DetectionDataset) else super().num_examples(dataloader)

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer; what it draws for its workers, some of them once and some every epoch, changes no dropout."""
        loader = super().get_train_dataloader()
        generator = torch.Generator().manual_seed(self.args.seed)
        loader.base_dataloader.generator = generator  # type: ignore[attr-defined]
        made = loader.base_dataloader.worker_init_fn  # type: ignore[attr-defined]
        loader.base_dataloader.worker_init_fn = partial(start_worker, made)  # type: ignore[attr-defined]
        return loader

    # loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """What the whole optimizer step's sums are divided by, per process: Trainer counts tokens, for one tensor.

        Returns:
            Images, objects, images with labels, and for each group the objects that find a query in it, in the order
            of `StepQueries.group_sizes`.
        """
        self._follow_schedule()
        labels = [label for batch in batch_samples for label in batch["labels"]]
        objects = [label["objects"] for label in labels]
        held = [sum(min(count, queries) for count in objects) for queries in self.queries.group_sizes().values()]
        labeled = sum(map(is_labeled, labels))
        counts = [len(objects), sum(objects), labeled, *held, self.stop.tell()]
        means = self._average(torch.tensor(counts, dtype=torch.float32, device=device))
        self._asked_to_stop = means[-1]
        return means[:-1]

    def _shares(self, counts: torch.Tensor, counted: bool = True) -> Shares:
        """The counts by name; no object in a whole step, or no labelled image, is one, of all processes together."""
        images, objects, labeled, *held = counts.unbind()
        objects = torch.where(objects == 0, 1 / self.accelerator.num_processes, objects)
        labeled = torch.where(labeled == 0, 1 / self.accelerator.num_processes, labeled)
        of_groups = dict(zip(self.queries.group_sizes(), held, strict=True))
        return Shares(images, objects, of_groups, self._average, counted, labeled)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The D3ETR objective instead of the model's own loss; every term is kept for the log."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        labels = inputs["labels"]  # none where the images only repeat others
        shares = self._shares(num_items_in_batch, counted=len(labels) > 0)
        counts, labeled = [label["objects"] for label in labels], list(map(is_labeled, labels))
        targets = Targets.from_packed(inputs["targets"], counts or [0], labeled)
        self.guard.begin(inputs, num_items_in_batch)
        try:
            student, terms, statistics = self._terms(model, inputs, targets, shares)
        except NonFiniteCostError as error:
            raise self.guard.refusal(error) from error
        trust = self.guard.watch(terms)
        sums = {name: term.sum() for name, term in terms.items()}
        loss = torch.stack(list(sums.values())).sum() * trust
        if model.training:
            # this batch's part of the step: over its processes' mean and its accumulated batches it adds up to one
            part = len(labels) / shares.images
            self._keep_for_log(sums, terms, statistics, part)
            if self.instability is not None:
                self._keep_instability(labels, part)
            if self.args.log_gradient_norms and self._takes_norms_in_this_step():
                self._keep_gradient_norms(sums, part)
        else:
            self.guard.look_at_terms()
        return (loss, student) if return_outputs else loss

    def _terms(self, model, inputs: dict[str, Any], targets: Targets, shares: Shares):
        """Teacher, student and objective on one batch: the student's output, terms and statistics."""
        teacher = assignment = None
        drawn, masks = self.queries.shared(targets, self.state.global_step)
        if self._runs_teacher:
            pixels = teacher_pixels(inputs)
            if self.teacher_cache is None:
                teacher = self.teacher(
                    pixels, self._maps._replace(queries=drawn, masks=masks), self.accelerator.autocast
                )
            else:
                teacher = self.teacher_cache(pixels)
            # threads assign while the student's forward pass runs
            assignment = self.objective.start_teacher_assignment(teacher, targets)
        further = self.queries.further(teacher) | drawn
        noised = self.queries.noised(inputs["labels"], targets, self.state.global_step)
        request = self._maps._replace(queries=further, masks=masks, targets=targets)
        if request.memory:
            request = request._replace(teacher_memory=teacher.memory)
        if noised is not None:
            request = request._replace(queries=further | noised.queries, masks=masks | noised.masks)
        pixels = {name: inputs[name] for name in ("pixel_values", "pixel_mask")}
        student: DetectorOutput = model(**pixels, request=request)
        if noised is not None:
            noised.supervise(student)
        if teacher is not None and (teacher.own_grid or "teacher_pixel_values" in inputs):
            teacher = teacher.on_memory(student.memory_mask)
        return student, *self.objective(student, teacher, targets, shares, assignment)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As Trainer; when the device has been given all its work, it hears whether any process was asked to stop."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.stop.hear(self._asked_to_stop)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # such a step stops the training, or is skipped

    def _get_grad_norm(self, model, grad_norm=None):
        """As Trainer; a gradient that is not finite reaches no weight."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.look_at_gradient(norm, model)
        return norm

    def trial_step(self, batch: dict, step: int | None = None) -> None:
        """Forward and backward pass of one batch as if it were a whole step; gradients and what is logged go again.

        All processes must call this. They do not exchange gradients. Nothing is kept of what the teacher says.

        Args:
            step: whose distillation is on, see `DistillationSchedule`; by default the step that comes next.
        """
        now = self.state.global_step
        cache, self.teacher_cache = self.teacher_cache, None
        kept = [dict(log.sums) for log in self._logs]
        try:
            self.state.global_step = now if step is None else step
            self.training_step(self.model, batch, self._get_num_items_in_batch([batch], self.args.device))
        finally:
            self.teacher_cache, self.state.global_step = cache, now
            self.model.zero_grad()
            self.guard.forget()
            for log, sums in zip(self._logs, kept, strict=True):
                log.sums = sums

    def _average(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "mean")

    def _of_all(self, names: list[str]) -> list[str]:
        """Every process's names, one after the other."""
        return gather_object(names) if self.accelerator.num_processes > 1 else names

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """float16's gradient scaler; None in every other precision."""
        return self.accelerator.scaler

    @property
    def _skips_steps(self) -> bool:
        """Whether a step that is not finite is passed over: by the scaler, or by the guard."""
        return self._scaler is not None or self.args.skip_nonfinite_steps > 0

    # logging

    def _keep_for_log(self, sums: dict, terms: dict, statistics: dict, part: torch.Tensor) -> None:
        values = {f"loss/{name}": value.detach() for name, value in sums.items()}
        if self.args.log_each_layer:
            for name, term in terms.items():
                values |= {f"loss/{name}/layer_{k}": value for k, value in enumerate(term.detach())}
        if self._skips_steps:  # such a step is none of those that the log tells the mean of
            finite = torch.stack(list(sums.values())).isfinite().all()
            values = {name: torch.where(finite, value, 0) for name, value in values.items()}
            statistics = {name: torch.where(finite, value, 0) for name, value in statistics.items()}
            part = part * finite
        self._term_log.add(values | {name: value * part for name, value in statistics.items()}, part)

    def _keep_instability(self, labels: list[dict], part: torch.Tensor) -> None:
        """What has changed since each image's last visit; the device is waited for."""
        epoch = 0 if self._epochs.sampler is None else self._epochs.sampler.epoch
        visits = [Visit(label["image_id"], label["objects"], epoch) for label in labels]
        counts = self.instability.compare(visits, self.objective.partners)
        self._change_log.add({name: count.to(part.device) for name, count in counts.items()}, part)

    def _keep_gradient_norms(self, sums: dict[str, torch.Tensor], part: torch.Tensor) -> None:
        """Norm of each term's own gradient, of this batch on this process as if it were the whole step, unclipped."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()  # float16 gradients underflow without it
        norms = {}
        for name, value in sums.items():
            gradients = torch.autograd.grad(value * scale, parameters, retain_graph=True, allow_unused=True)
            squares = [(gradient / scale).square().sum() for gradient in gradients if gradient is not None]
            norms[f"gradient_norm/{name}"] = torch.stack(squares).sum().sqrt() / part.clamp(min=1e-9)
        self._norm_log.add(norms, (part > 0).to(part))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last training log, the steps that were skipped, instability."""
        if "loss" in logs:
            logs |= self._term_log.read() | self._norm_log.read() | shares_of(self._change_log.read())
            if self._scaler is not None:
                logs["skipped_steps"] = self.skipped_steps.read()
            elif self.args.skip_nonfinite_steps:
                logs["skipped_steps"] = self.guard.skipped
        super().log(logs, start_time)

    def _takes_norms_in_this_step(self) -> bool:
        """Whether it is the last that distils before a log, or the last before it where none of them does."""
        step, every = self.state.global_step, max(1, int(self.state.logging_steps))
        first, end = step // every * every, (step // every + 1) * every  # of steps that are logged together
        if self.args.logging_first_step and first == 0:
            first, end = (0, 1) if step == 0 else (1, every)
        weight, steps = self.args.schedule.weight, self.state.max_steps
        return step == next((s for s in reversed(range(first, end)) if weight(s, steps) > 0), end - 1)

    # optimisation

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer that Trainer would make, over two groups: the backbone has its own learning rate."""
        if self.optimizer is None:
            args = self.args
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                args, self.model if model is None else model
            )
            if {"params", "model", "optimizer_dict"} & set(options):
                raise UnsupportedOptionError(f"optim={args.optim!r} makes its own parameter groups: choose another")
            groups = parameter_groups(self.model, args.learning_rate, args.backbone_learning_rate, args.weight_decay)
            self.optimizer, self.optimizer_options = optimizer_class(groups, **options), options
        self._refuse_left_out_parameters()
        return super().create_optimizer(model)

    def _refuse_left_out_parameters(self) -> None:
        """An optimizer that was made before this trainer knows nothing of the adapters that it adds to the student."""
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        named = self.model.query_adapters.named_parameters(ADAPTERS)
        if left_out := [name for name, parameter in named if id(parameter) not in known]:
            raise UnsupportedOptionError(
                f"the optimizer that was given does not train {left_out}, which this trainer adds to the student: "
                "pass optimizer_cls_and_kwargs instead of optimizers"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """With `learning_rate_drop` the paper's single drop to a tenth; otherwise Trainer's own schedules."""
        if self.lr_scheduler is None and self.args.learning_rate_drop is not None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = single_drop(
                optimizer or self.optimizer, num_training_steps, warmup, self.args.learning_rate_drop
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Of all images: `dataloader_drop_last` leaves the rest of an epoch out of training, and of nothing else."""
        with patch.object(self.args, "dataloader_drop_last", False):
            return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """Remembers which data set is evaluated: the metric reads its untouched ground truth."""
        check_data(self.model, None, {"eval_dataset": dataloader.dataset})
        self._evaluated_dataset = dataloader.dataset
        if self.accelerator.num_processes > 1 and keeps_running_statistics(self.model):
            # each process has counted images of its own since the last forward pass of training
            broadcast(dict(self.model.named_buffers()), from_process=0)
        # a data loader draws the seed of its workers: training must go on as if nothing had been evaluated
        with self._averaged(), torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        if self.model_wrapped is self.model and not self.is_in_train:
            # Evaluated before it was trained. Accelerate marks the model as prepared and would then leave it unwrapped
            # in training: every process would go on with gradients of its own, and say nothing.
            self.model._is_accelerate_prepared = False
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Detections of fixed size and image ids: labels of ragged size would hang or be lost over processes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            detections = detect(model, inputs, self.model.scores, self.model.dtype)
        image_ids = torch.tensor([label["image_id"] for label in inputs["labels"]], device=detections.device)
        return None, detections, image_ids

    def _average_precision(self, prediction: EvalPrediction) -> dict[str, float]:
        """COCO average precision of the evaluated data set, computed once and sent to every process."""
        found: list = [None, None]  # metrics and an error: a process that raised alone would leave the others waiting
        if self.is_world_process_zero():
            detections = torch.as_tensor(prediction.predictions)
            try:
                found[0] = average_precision_of(detections, self._evaluated_dataset, prediction.label_ids)
            except EvaluationError as error:
                found[1] = error
            except ValueError as error:
                found[1] = NonFiniteLossError(f"evaluation after step {self.state.global_step}: {error}")
        metrics, refusal = broadcast_object_list(found)
        if refusal is not None:
            raise refusal
        return metrics


def runs_teacher(teacher: Teacher, options: Distillation) -> bool:
    """Whether a step runs the teacher: for its outputs, or for queries that depend on the image."""
    reads_queries = bool(options.teacher_groups) and teacher.queries() is None
    return reads_queries or options.reads_teacher_outputs
