"""`D3etrTrainer`: Transformers' Trainer with a teacher, a second query group and COCO evaluation."""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from d3etr_hf.data import DetectionCollator
from d3etr_hf.errors import NonFiniteCostError, NonFiniteLossError, UnsupportedOptionError
from d3etr_hf.evaluation import coco_average_precision, select_detections, to_coco_detections
from d3etr_hf.matching import Targets
from d3etr_hf.models import AuxiliaryQueries, D3etrConditionalDetrForObjectDetection, DetectorOutput
from d3etr_hf.models.loading import class_names_of
from d3etr_hf.publishing.hub_trainer import PublishingTrainer
from d3etr_hf.training.compatibility import (
    check_data_classes,
    check_image_processors,
    check_models,
    class_index_by_name,
    spread_layers,
)
from d3etr_hf.training.objective import D3etrObjective, Shares
from d3etr_hf.training.training_arguments import D3etrTrainingArguments

logger = logging.get_logger(__name__)

AUXILIARY_WEIGHTS = "extra_query_groups.safetensors"
STEPS = "steps"


class D3etrTrainer(PublishingTrainer):
    """Trains a detector by D3ETR, or plainly when the options need no teacher.

    Args:
        model: the student, a `D3etrConditionalDetrForObjectDetection`.
        args: `D3etrTrainingArguments`.
        teacher: a model of the same class, or None. It is moved, frozen and kept out of everything that is saved.
        teacher_processing_class: the teacher's image processor, checked against `processing_class`.
        train_dataset, eval_dataset: `DetectionDataset`s with a transform; evaluation reads the data set's own ground
            truth.
        processing_class: the image processor that is saved with the student.
        trainer_options: everything else that `Trainer` takes, but `model_init` and `compute_loss_func`.

    Raises:
        IncompatibleTeacherError: the teacher cannot teach this student as the options say.
    """

    def __init__(
        self,
        model: D3etrConditionalDetrForObjectDetection,
        args: D3etrTrainingArguments,
        teacher: D3etrConditionalDetrForObjectDetection | None = None,
        teacher_processing_class: BaseImageProcessor | None = None,
        **trainer_options,
    ):
        for name in ("model_init", "compute_loss_func"):
            if trainer_options.get(name) is not None:
                raise UnsupportedOptionError(f"{name} is not supported: the loss and query groups are this trainer's")
        check_models(model, teacher, args)
        check_image_processors(trainer_options.get("processing_class"), teacher_processing_class)
        eval_sets = trainer_options.get("eval_dataset")
        named = eval_sets if isinstance(eval_sets, dict) else {"eval_dataset": eval_sets}
        check_data_classes(model.config, {"train_dataset": trainer_options.get("train_dataset"), **named})
        class_index = layer_map = None
        if teacher is not None:
            class_index = class_index_by_name(teacher.config, class_names_of(model.config))
            layer_map = spread_layers(teacher.config.decoder_layers, model.config.decoder_layers, args.layer_map)
        if args.backbone_learning_rate == 0:
            model.model.freeze_backbone()
        trainer_options.setdefault("data_collator", DetectionCollator())
        trainer_options.setdefault("compute_metrics", self._average_precision)
        super().__init__(model=model, args=args, **trainer_options)
        # after Trainer has set the seed: learned queries are drawn
        attach_auxiliary_queries(model, teacher, args)
        # the loss is already divided by what the whole step holds, accumulated batches included
        self.loss_is_scaled_for_ga = True
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        self.teacher_processing_class = teacher_processing_class
        self.objective = D3etrObjective(args, model.config, class_index, layer_map)
        self._logged_sums: dict[str, torch.Tensor] = {}
        self._gradient_norm_sums: dict[str, torch.Tensor] = {}
        self._evaluated_dataset = None

    # loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Boxes and images of the whole optimizer step per process, `(2,)`: Trainer counts tokens, for one tensor."""
        labels = [label for batch in batch_samples for label in batch["labels"]]
        counts = [sum(len(label["class_labels"]) for label in labels), len(labels)]
        return self._average(torch.tensor(counts, dtype=torch.float32, device=device))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The D3ETR objective instead of the model's own loss; every term is kept for the log."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        boxes, images = num_items_in_batch.unbind()
        pixels = {name: inputs[name] for name in ("pixel_values", "pixel_mask")}
        maps = {
            "return_self_attention": self.args.self_attention_weight > 0 and bool(self.args.distilled_groups()),
            "return_cross_attention": self.args.cross_attention_weight > 0 and bool(self.args.distilled_groups()),
        }
        teacher = None
        if self.teacher is not None and self.args.reads_teacher_outputs:
            # outside the model's own forward pass there is no autocast but this
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher(**pixels, return_groups=True, **maps)
        student: DetectorOutput = model(**pixels, return_groups=True, **maps)
        shares = Shares(boxes.clamp(min=1), images, self._average)
        try:
            targets = Targets.from_labels(inputs["labels"])
            terms, statistics = self.objective(student, teacher, targets, shares)
        except NonFiniteCostError as error:
            image_ids = _image_ids(inputs["labels"][error.image : error.image + 1])
            raise NonFiniteLossError(self._divergence_report(str(error), image_ids)) from error
        sums = {name: term.sum() for name, term in terms.items()}
        self._refuse_non_finite(sums, inputs["labels"])
        if model.training:
            # this batch's part of the step: over its processes' mean and its accumulated batches it adds up to one
            part = len(inputs["labels"]) / images
            self._keep_for_log(sums, terms, statistics, part)
            if self.args.log_gradient_norms and self._logs_after_this_step():
                self._keep_gradient_norms(sums, part)
        loss = torch.stack(list(sums.values())).sum()
        return (loss, student) if return_outputs else loss

    def _average(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "mean")

    def _refuse_non_finite(self, sums: dict[str, torch.Tensor], labels: list[dict]) -> None:
        finite = torch.stack(list(sums.values())).isfinite()
        if not finite.all():
            bad = [name for name, good in zip(sums, finite.tolist(), strict=True) if not good]
            raise NonFiniteLossError(
                self._divergence_report(f"loss term {', '.join(bad)} is NaN or infinite", _image_ids(labels))
            )

    def _divergence_report(self, what: str, image_ids: list[int]) -> str:
        checkpoints = sorted(Path(self.args.output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        kept = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint had been saved yet"
        return f"step {self.state.global_step + 1}, image ids {image_ids}: {what}; {kept}"

    # logging: sums in a fixed order, reduced when the trainer logs (exact over processes and accumulated batches)

    def train(self, *args, **kwargs):
        """Forgets what an earlier training left unlogged."""
        self._logged_sums, self._gradient_norm_sums = {}, {}
        return super().train(*args, **kwargs)

    def _keep_for_log(self, sums: dict, terms: dict, statistics: dict, part: torch.Tensor) -> None:
        values = {f"loss/{name}": value.detach() for name, value in sums.items()}
        if self.args.log_each_layer:
            for name, term in terms.items():
                values |= {f"loss/{name}/layer_{k}": value for k, value in enumerate(term.detach())}
        values |= {name: value * part for name, value in statistics.items()}
        _add(self._logged_sums, values | {STEPS: part})

    def _keep_gradient_norms(self, sums: dict[str, torch.Tensor], part: torch.Tensor) -> None:
        """Norm of each term's own gradient, of this batch on this process as if it were the whole step, unclipped."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norms = {STEPS: torch.ones_like(part)}
        for name, value in sums.items():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
            norms[f"gradient_norm/{name}"] = torch.stack(squares).sum().sqrt() / part
        _add(self._gradient_norm_sums, norms)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last training log."""
        if "loss" in logs:
            for sums in (self._logged_sums, self._gradient_norm_sums):
                logs |= self._means(sums)
                sums.clear()
        super().log(logs, start_time)

    def _means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums over the sum of parts, both averaged over processes in a fixed order."""
        if not sums:
            return {}
        names = sorted(sums)
        values = self._average(torch.stack([sums[name].float() for name in names])).tolist()
        means = dict(zip(names, values, strict=True))
        steps = means.pop(STEPS)
        return {name: value / steps for name, value in means.items()}

    def _logs_after_this_step(self) -> bool:
        step = self.state.global_step + 1
        return step % max(1, int(self.state.logging_steps)) == 0 or (step == 1 and self.args.logging_first_step)

    # optimisation

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer that Trainer would make, over two groups: the backbone has its own learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = {False: [], True: []}  # Trainer logs the first group's learning rate
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[".backbone." in f".{name}"].append(parameter)
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, model
            )
            if {"params", "model", "optimizer_dict"} & set(options):
                raise UnsupportedOptionError(
                    f"optim={self.args.optim!r} makes its own parameter groups: choose another"
                )
            rates = {True: self.args.backbone_learning_rate, False: self.args.learning_rate}
            self.optimizer = optimizer_class(
                [
                    {"params": parameters, "lr": rates[backbone], "weight_decay": self.args.weight_decay}
                    for backbone, parameters in groups.items()
                    if parameters
                ],
                **options,
            )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """With `learning_rate_drop` the paper's single drop to a tenth; otherwise Trainer's own schedules."""
        if self.lr_scheduler is None and self.args.learning_rate_drop is not None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            drop = round(self.args.learning_rate_drop * num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: min(1.0, (step + 1) / max(1, warmup)) * (0.1 if step >= drop else 1.0),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """Remembers which data set is evaluated: the metric reads its untouched ground truth."""
        self._evaluated_dataset = dataloader.dataset
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if self.model_wrapped is self.model and not self.is_in_train:
            # Evaluated before it was trained. Accelerate marks the model as prepared and would then leave it unwrapped
            # in training: every process would go on with gradients of its own, and say nothing.
            self.model._is_accelerate_prepared = False
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Detections of fixed size and image ids: labels of ragged size would hang or be lost over processes."""
        inputs = self._prepare_inputs(inputs)
        pixel_values = inputs["pixel_values"].to(self.model.dtype)  # other than float32 under bf16_full_eval
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=pixel_values, pixel_mask=inputs["pixel_mask"])
        sizes = torch.stack([label["orig_size"] for label in inputs["labels"]])
        image_ids = torch.cat([label["image_id"] for label in inputs["labels"]])
        return None, select_detections(outputs.logits, outputs.pred_boxes, sizes), image_ids

    def _average_precision(self, prediction: EvalPrediction) -> dict[str, float]:
        """COCO average precision of the evaluated data set, computed once and sent to every process."""
        metrics = [None]
        if self.is_world_process_zero():
            dataset = self._evaluated_dataset
            try:
                detections = to_coco_detections(prediction.predictions, prediction.label_ids, dataset.category_ids)
            except ValueError as error:
                raise NonFiniteLossError(f"evaluation after step {self.state.global_step}: {error}") from error
            metrics = [coco_average_precision(dataset.ground_truth, detections)]
        return broadcast_object_list(metrics)[0]

    # checkpoints: the student is saved as a stock model, in Transformers' published tensor names

    def _save_checkpoint(self, model, trial) -> None:
        """Also keeps what trains but is no part of the student, so that the run can go on."""
        # parameters only: a teacher's queries come with the teacher
        state = dict(self.model.extra_query_groups.named_parameters())
        if state and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().contiguous() for name, value in state.items()}, folder / AUXILIARY_WEIGHTS)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Reads a checkpoint back through `from_pretrained`.

        Trainer loads the file's names as they are and not strictly; published names of Conditional DETR differ from
        the module's, so most of the student would be left at its start values with nothing but a warning.
        """
        model = self.model if model is None else model
        loaded = type(self.model).from_pretrained(resume_from_checkpoint).state_dict()
        wanted = {f"extra_query_groups.{name}" for name, _ in self.model.extra_query_groups.named_parameters()}
        extra = Path(resume_from_checkpoint) / AUXILIARY_WEIGHTS
        if extra.exists():
            loaded |= {f"extra_query_groups.{name}": value for name, value in load_file(extra).items()}
        if missing := sorted(wanted - set(loaded)):
            raise ValueError(f"{resume_from_checkpoint} is no checkpoint of this run: {missing} are not in {extra}")
        model.load_state_dict(loaded, strict=False)  # all of the student, and of the rest what is trained

    def _load_best_model(self) -> None:
        """As Trainer, but by `from_pretrained`, for the reason given in `_load_from_checkpoint`."""
        logger.info(f"Loading best model from {self.state.best_model_checkpoint}")
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def attach_auxiliary_queries(
    student: D3etrConditionalDetrForObjectDetection,
    teacher: D3etrConditionalDetrForObjectDetection | None,
    args: D3etrTrainingArguments,
) -> None:
    """Give the student its second query group, as `args.auxiliary_queries` says, instead of any from before."""
    student.extra_query_groups = torch.nn.ModuleList()
    width = student.config.d_model
    if args.auxiliary_queries == "learned":
        student.add_query_group(AuxiliaryQueries(torch.randn(student.config.num_queries, width), width, learned=True))
    elif args.auxiliary_queries == "teacher":
        queries = teacher.model.query_position_embeddings.weight
        points = None
        if args.auxiliary_reference_points == "teacher":
            with torch.no_grad():
                points = teacher.model.decoder.ref_point_head(queries).sigmoid()
        student.add_query_group(AuxiliaryQueries(queries, width, points))


def _add(sums: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _image_ids(labels: list[dict]) -> list[int]:
    return [int(label["image_id"]) for label in labels]
