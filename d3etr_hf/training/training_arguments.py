"""What a user of the trainer can set, beside Transformers' own training arguments."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from d3etr_hf.configurations import option
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.distillation_schedule import DistillationSchedule
from d3etr_hf.training.launch_checks import check_launcher
from d3etr_hf.training.option_checks import check_options, wants_best
from d3etr_hf.training.option_trials import check_what_options_build
from d3etr_hf.training.weight_average import check_decay

# names of earlier versions, which could be taken for weights of the detection loss
RENAMED_OPTIONS = {
    "class_weight": "distillation_class_weight",
    "l1_weight": "distillation_l1_weight",
    "giou_weight": "distillation_giou_weight",
}


def fields_of(dataclass_type: type) -> list[str]:
    """Names of a dataclass's fields."""
    return [field.name for field in fields(dataclass_type)]


# fields of the training arguments that plain training has no use for
DISTILLATION_OPTIONS = (
    *(name for name in fields_of(Distillation) if name != "detection_weight"),
    *fields_of(DistillationSchedule),
    "layer_map",
)


@dataclass
class D3etrTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the recipe of Conditional DETR's authors as defaults, and D3ETR's options.

    Raises:
        ValueError: an option is out of its range, or two contradict each other; the message names them.
    """

    # Conditional DETR's recipe (its authors' code)
    learning_rate: float = option(1e-4, "Peak learning rate of everything but the backbone.")
    backbone_learning_rate: float = option(1e-5, "Peak learning rate of the backbone; 0 freezes it.")
    learning_rate_drop: float | None = option(
        None,
        "Share of the training after which both learning rates are divided by ten (the paper: 0.8 of 50 epochs, 11/12 "
        "of 12), instead of `lr_scheduler_type`; warmup is kept.",
    )
    weight_decay: float = option(1e-4, "AdamW's weight decay, on every parameter as in the paper.")
    max_grad_norm: float = option(0.1, "Norm to which the gradient is clipped.")
    per_device_eval_batch_size: int = option(8, "Images per device in evaluation.")

    # the auxiliary query group
    auxiliary_queries: Literal["teacher", "learned", "none"] = option(
        Distillation.auxiliary_queries,
        "The second query group of the student's decoder: the teacher's fixed queries, learned queries of its own "
        "(the teacherless control, as many as the student has), or none.",
    )
    auxiliary_groups: int = option(
        Distillation.auxiliary_groups,
        "How many groups of learned queries (auxiliary_queries='learned') there are beside the student's own: K - 1 "
        "of Group DETR (Chen et al., ICCV 2023), whose authors take K = 11 and average the groups' losses "
        "(group_reduction='mean').",
    )
    denoising_groups: int = option(
        Distillation.denoising_groups,
        "Groups of DN-DETR's denoising queries (Li et al., CVPR 2022), one query an object in each, for students "
        "whose queries have anchors and whose family trains with none: boxes and classes with noise, which the "
        "decoder takes off; its authors take 5. 0 for none.",
    )
    denoising_box_noise: float = option(
        Distillation.denoising_box_noise,
        "How far their boxes are moved, at most, in halves of a side, and scaled, as a share of it.",
    )
    denoising_label_noise: float = option(
        Distillation.denoising_label_noise, "Share of their classes that are drawn anew from all."
    )
    one_to_many_queries: int = option(
        Distillation.one_to_many_queries,
        "H-DETR's one-to-many branch (Jia et al., CVPR 2023): so many further learned queries, of which every object "
        "is asked several times in every decoder layer; its authors take 1500 beside 300. 0 for none.",
    )
    one_to_many_repeats: int = option(
        Distillation.one_to_many_repeats, "How many of H-DETR's queries are asked for each object (K)."
    )
    one_to_many_weight: float = option(
        Distillation.one_to_many_weight, "Weight of that branch's detection loss beside the student's own."
    )
    auxiliary_reference_points: Literal["student", "teacher"] = option(
        Distillation.auxiliary_reference_points,
        "Whose head turns the teacher's queries into reference points: the student's (the paper's literal reading) or "
        "the teacher's (its points are handed over with the queries).",
    )
    auxiliary_assignment: Literal[
        "teacher_last_layer", "teacher_last_layer_everywhere", "teacher_per_layer", "own"
    ] = option(
        Distillation.auxiliary_assignment,
        "Which ground-truth object a query of the auxiliary group answers for: the one its teacher query was "
        "assigned in the last layer (earlier layers keep their own Hungarian assignment), the same in all layers, "
        "the teacher's assignment of each layer, or its own Hungarian assignment everywhere.",
    )
    group_reduction: Literal["sum", "mean"] = option(
        Distillation.group_reduction, "Detection losses of all groups: summed (D3ETR), or averaged (Group DETR)."
    )

    # distillation
    adaptive_matching: bool = option(
        Distillation.adaptive_matching,
        "Distil into the student group, by adaptive matching; with fixed matching beside it, it was a little ahead "
        "of itself alone, with three seeds (model_cards/RESULTS.md, which part pays).",
    )
    matching_score_threshold: float = option(
        Distillation.matching_score_threshold,
        "Adaptive matching leaves out the teacher's queries whose highest class score is not above it, so that "
        "nothing is learned of them there (Incremental-DETR, Dong et al., AAAI 2023); 0 takes all.",
    )
    fixed_matching: bool = option(
        Distillation.fixed_matching, "Distil into the auxiliary group, query i from query i."
    )
    self_attention_weight: float = option(
        Distillation.self_attention_weight,
        "Weight of self-attention distillation; 0 switches it off. Of the three terms the one whose gain nothing has "
        "shown yet (model_cards/RESULTS.md, which part pays).",
    )
    cross_attention_weight: float = option(
        Distillation.cross_attention_weight,
        "Weight of cross-attention distillation; 0 switches it off. Of the three terms the one that carries the gain "
        "(model_cards/RESULTS.md, which part pays).",
    )
    prediction_weight: float = option(
        Distillation.prediction_weight,
        "Weight of prediction distillation; 0 switches it off, which was 2.5 AP better beside cross-attention for a "
        "small student after a short schedule, with three seeds (model_cards/RESULTS.md, which part pays).",
    )
    box_distribution_weight: float = option(
        Distillation.box_distribution_weight,
        "Weight of the distillation of box distributions, between two models that predict such (D-FINE, DEIMv2): "
        "where the teacher sees each edge, weighted by its class score; 0 switches it off.",
    )
    fitnet_weight: float = option(
        Distillation.fitnet_weight,
        "Weight of FitNet's mean squared error of encoder memories, through a learned projection; 0 switches it off.",
    )
    fgd_weight: float = option(
        Distillation.fgd_weight,
        "Weight of FGD on encoder memories: differences in objects and around them apart, where the teacher's "
        "features are large, and of what each token learns from all others; 0 switches it off.",
    )
    defeat_weight: float = option(
        Distillation.defeat_weight,
        "Weight of DeFeat on encoder memories: differences in objects and around them, each as a whole; 0 switches it "
        "off.",
    )
    detrdistill_memory_weight: float = option(
        Distillation.detrdistill_memory_weight,
        "Weight of DETRDistill's feature distillation on encoder memories: differences where the teacher's good "
        "queries look alike; 0 switches it off.",
    )
    clockdistill_memory_weight: float = option(
        Distillation.clockdistill_memory_weight,
        "Weight of CLoCKDistill's memory distillation: differences of encoder memories in objects, each as a whole, "
        "and very little around them; 0 switches it off.",
    )
    icd_weight: float = option(
        Distillation.icd_weight,
        "Weight of ICD on encoder memories: differences where a decoder, which learns that beside, finds each object "
        "in the teacher's; 0 switches it off.",
    )
    vidt_weight: float = option(
        Distillation.vidt_weight,
        "Weight of ViDT's token matching: distances of tokens of encoder memories and of the last decoder layer's "
        "queries, each from the one at its place; 0 switches it off.",
    )
    logits_distillation_weight: float = option(
        Distillation.logits_distillation_weight,
        "Weight of DETRDistill's Hungarian-matching logits distillation (Chang et al., ICCV 2023) into the student's "
        "own group, layer by layer: class and box of the teacher's queries that hold an object, and the boxes of all "
        "others; 0 switches it off. Its query-prior assignment is auxiliary_queries='teacher' with "
        "auxiliary_assignment='teacher_per_layer' and fixed_matching off.",
    )
    logits_negative_weight: float = option(
        Distillation.logits_negative_weight,
        "Of logits distillation: weight of the queries without an object, beside the 1 of those that hold one.",
    )
    logits_layer_weights: list[float] | None = option(
        None, "Of logits distillation: a weight for each decoder layer of the student; by default all weigh 1."
    )
    shared_query_weight: float = option(
        Distillation.shared_query_weight,
        "Weight of KD-DETR's distillation (Wang et al., CVPR 2024): both decoders are given the same queries, and "
        "their predictions are compared query by query, each weighed by the teacher's highest class score; 0 switches "
        "it off.",
    )
    shared_random_queries: int = option(
        Distillation.shared_random_queries,
        "How many of KD-DETR's queries are random ones, drawn anew every step; 0 for none.",
    )
    shared_teacher_queries: bool = option(
        Distillation.shared_teacher_queries,
        "Whether the teacher's own queries are among KD-DETR's, at the points that auxiliary_reference_points names.",
    )
    shared_object_queries: bool = option(
        Distillation.shared_object_queries,
        "Whether queries made of boxes and classes of the ground truth are among the queries that both decoders are "
        "given, as in CLoCKDistill (Lan & Tian, arXiv 2502.10683); both models' queries must have anchors.",
    )
    detection_weight: float = option(
        Distillation.detection_weight, "Weight of the detection loss of both groups; 0 switches it off."
    )
    distillation_class_weight: float = option(
        Distillation.distillation_class_weight,
        "Weight of the class term in the adaptive matching cost and in prediction distillation.",
    )
    distillation_l1_weight: float = option(
        Distillation.distillation_l1_weight,
        "Weight of the L1 box term in the adaptive matching cost and in prediction distillation.",
    )
    distillation_giou_weight: float = option(
        Distillation.distillation_giou_weight,
        "Weight of the GIoU term in the adaptive matching cost and in prediction distillation.",
    )
    attention_divergence: Literal["kl", "mse"] = option(
        Distillation.attention_divergence,
        "How attention maps are compared: KL(teacher || student), or the mean squared difference.",
    )
    cross_attention_space: Literal["auto", "grid", "moments", "places"] = option(
        Distillation.cross_attention_space,
        "Where cross-attention is compared: on the grid of the student's memory (sampled attention is spread over "
        "it), by centre and spread of where each query looks (moments), or place by place (two samplers of equal "
        "heads, levels and points); auto: places where they can be, else moments, and the grid for two dense maps.",
    )
    prediction_normaliser: Literal["pairs", "boxes"] = option(
        Distillation.prediction_normaliser,
        "Prediction distillation is a mean over all pairs, or one weighted by the teacher's highest class score "
        "(with accumulated batches, the mean over batches of each one's).",
    )
    layer_map: list[int] | None = option(
        None,
        "For each decoder layer of the student the teacher's layer that it follows, from 0; by default evenly spread, "
        "last to last.",
    )

    distillation_interval: int = option(
        DistillationSchedule.distillation_interval,
        "Distil on each so many-th step only, from the first: on the others the teacher is not asked, and the "
        "student's own detection loss is left. Logged terms are means over all steps.",
    )
    distillation_end: float = option(
        DistillationSchedule.distillation_end,
        "Share of the training after which there is no distillation and no auxiliary group, and a step costs no more "
        "than without; half of a long one was no worse than all (model_cards/RESULTS.md, how long it keeps its lead).",
    )
    distillation_decay: bool = option(
        DistillationSchedule.distillation_decay,
        "Let the weights of the distillation terms fall in a straight line, to 0 at `distillation_end`.",
    )
    teacher_cache: str | None = option(
        None,
        "Folder where the teacher's outputs are kept, so that it sees each image once and not every epoch; for "
        "augmentation none. It is asked for each image alone, unpadded; runs of the same teacher share a folder.",
    )

    # what is saved
    ema_decay: float | None = option(
        None,
        "Decay of an exponential moving average of the student's weights, which is evaluated and saved instead of "
        "them (RT-DETR, D-FINE: 0.9999); none by default.",
    )
    ema_warmup_steps: int = option(
        2000, "Steps after which the average keeps two thirds of `ema_decay` a step; it forgets the first ones fast."
    )

    early_stopping_patience: int | None = option(
        None,
        "Evaluations one after another without a better `metric_for_best_model` (by default AP) after which the "
        "training stops; by default it never does.",
    )

    # logging
    log_each_layer: bool = option(False, "Log every loss term per decoder layer (or memory level) too.")
    log_gradient_norms: bool = option(
        False, "Log the gradient norm of every loss term at each logging step (costs one backward pass a term)."
    )

    log_instability: bool = option(
        False,
        "Log how much matchings change between two visits of an image, in each decoder layer: the share of queries "
        "with another partner (DN-DETR's instability), as instability/adaptive (of the teacher's queries), /own, "
        "/auxiliary_own and /teacher_given (of ground truth to the queries of a group). From the second epoch on, of "
        "a run that goes on, too; of about 5000 images at most, each as far as it comes to the same process again. "
        "The model card then shows it.",
    )
    probe: bool = option(
        True,
        "Of d3etr train and distill: before the first step, print how much memory and time the training will take, "
        "and the largest batch that fits. Takes about five steps and changes no result; trainings of fewer than 50 "
        "steps, those that go on from a checkpoint and compiled models go without.",
    )

    # of commands, which do one thing each
    do_train: bool = option(True, "Training commands train; `d3etr evaluate` only evaluates.")
    do_eval: bool = option(True, "Training commands evaluate at the end; when else, `eval_strategy` says.")

    # what a detector needs of Transformers' own arguments
    remove_unused_columns: bool = option(False, "The data set hands over finished examples; must stay off.")
    ddp_find_unused_parameters: bool | None = option(
        None, "Whether distributed training searches for unused parameters; on only where the options leave some."
    )
    skip_nonfinite_steps: int = option(
        0,
        "How many optimizer steps whose loss or gradient is NaN or infinite are skipped, each kept in the output "
        "folder (d3etr reproduce), before one stops the training.",
    )
    logging_nan_inf_filter: bool = option(False, "Training stops on NaN instead of hiding it.")

    def __new__(cls, *args, **kwargs):
        for name in RENAMED_OPTIONS.keys() & kwargs.keys():
            raise TypeError(f"{name!r} is called {RENAMED_OPTIONS[name]!r} now: use that name")
        return super().__new__(cls)

    def __post_init__(self):
        if self.metric_for_best_model is None and wants_best(self):
            self.metric_for_best_model = "AP"  # Transformers would take a loss that evaluation does not compute
        check_launcher()
        self._check_choices()
        check_options(self)
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)  # PyTorch takes no whole 0
        super().__post_init__()
        check_what_options_build(self)
        self.label_names = ["labels"]
        if self.ddp_find_unused_parameters is None:
            # without the detection loss some part may get no gradient (heads, proposals, an adapter), nor may an
            # adapter in steps without distillation, and processes would wait for it
            self.ddp_find_unused_parameters = self.detection_weight == 0 or not self.schedule.is_constant
        self._check_weights()
        self.schedule.check(self.distillation)
        check_decay(self.ema_decay, self.ema_warmup_steps)
        if self.skip_nonfinite_steps < 0:
            raise ValueError(f"skip_nonfinite_steps={self.skip_nonfinite_steps}: must be 0 or more")
        if self.learning_rate_drop is not None and not 0 < self.learning_rate_drop < 1:
            raise ValueError(f"learning_rate_drop={self.learning_rate_drop}: must lie between 0 and 1, or be left out")

    def _check_weights(self) -> None:
        weights = [name for name in fields_of(Distillation) if name.endswith("_weight")]
        for name in ("backbone_learning_rate", *weights):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.detection_weight == 0 and not self.distillation.reads_teacher_outputs:
            raise ValueError("every loss is off: set detection_weight, or a distillation weight and a matching")
        if not any(self.distillation.match_weights):
            raise ValueError(
                "distillation_class_weight, distillation_l1_weight and distillation_giou_weight are all 0: at least "
                "one must be positive"
            )

    def _check_choices(self) -> None:
        """Values outside a field's choices are refused here too, where the command line is not there to do it."""
        hints = get_type_hints(D3etrTrainingArguments)
        for name in D3etrTrainingArguments.__annotations__:
            value, choices = getattr(self, name), get_args(hints[name])
            if get_origin(hints[name]) is Literal and value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {list(choices)}")

    @property
    def distillation(self) -> Distillation:
        """The options that the objective takes."""
        return Distillation(**{name: getattr(self, name) for name in fields_of(Distillation)})

    @property
    def schedule(self) -> DistillationSchedule:
        """When they hold."""
        return DistillationSchedule(**{name: getattr(self, name) for name in fields_of(DistillationSchedule)})
