"""Any other detector as a teacher: what it predicts, and nothing of how."""

from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForObjectDetection, PreTrainedModel

from d3etr_hf.errors import DetectorLoadError
from d3etr_hf.losses import CrossEntropyCriterion, DetectionCriterion, FocalCriterion
from d3etr_hf.models.detector import class_names_of
from d3etr_hf.models.timm_names import read_config
from d3etr_hf.models.trial import build_on_meta, library_errors
from d3etr_hf.models.weight_files import check_loaded, check_weight_files, quiet_loading
from d3etr_hf.outputs import OWN, DetectorOutput, GroupOutput, GroupRequest, Scores, SelectedScores, wide
from d3etr_hf.outputs.attention_maps import valid_sizes

# of the image with which a model is tried once: its scores are told apart by the number of its outputs
TRIED_SIDE = 320
# DETR's weights of class, L1 and GIoU, in costs and losses
DETR_WEIGHTS = 1.0, 5.0, 2.0


class OtherDetector(nn.Module):
    """A detector of no family here that can teach predictions: no queries, no attention, one layer, the last.

    Args:
        model: a model of Transformers that returns `logits` `(B, N, C)` (sigmoid) or `(B, N, C + 1)` (softmax, no
            object last) and `pred_boxes` `(B, N, 4)` cxcywh in 0..1, for pixels alone.
        role: what it is for, as the errors call it.

    Attributes:
        title: its class.
        decoder_depth: 1.
        predictions_only: true.
        reads_padding: true: its boxes are taken from the padded image to the image here, see `forward`.
        side_divisor: 1, as far as is known.
        predicts_distributions: false.
        anchor_size, query_count, width, makes_anchors: of the queries that it does not have.
        tag, citation, parts: not known of it.
        name_or_path: where it was loaded from.

    Raises:
        DetectorLoadError: it does not return these.
    """

    decoder_depth = 1
    predictions_only = True
    reads_padding = True
    side_divisor = 1
    predicts_distributions = False
    anchor_size = query_count = width = 0
    makes_anchors = False
    tag = citation = ""
    parts: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, model: PreTrainedModel, role: str = "teacher"):
        super().__init__()
        self.model = model.eval()
        self.config, self.title, self.name_or_path = model.config, type(model).__name__, model.name_or_path
        self.class_names = class_names_of(model.config)
        self._read: list[int] | None = None
        self._criterion = self._told_apart(role)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def _told_apart(self, role: str) -> DetectionCriterion:
        """How its scores are read, by the number of its outputs for an empty image."""
        image = torch.zeros(1, 3, TRIED_SIDE, TRIED_SIDE, dtype=self.dtype, device=self.model.device)
        classes, what = len(self.class_names), f"{role} {self.name_or_path!r}, a {self.title},"
        try:
            output = self.model(pixel_values=image)
            outputs = output.logits.shape[-1]
            if output.pred_boxes.shape != (*output.logits.shape[:2], 4):
                raise ValueError(f"pred_boxes has the shape {tuple(output.pred_boxes.shape)}")
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise DetectorLoadError(
                f"{what} gives no logits and pred_boxes for pixels alone ({type(error).__name__}: {error}): its "
                "detections cannot be read"
            ) from error
        if outputs == classes:
            return FocalCriterion(*DETR_WEIGHTS, *DETR_WEIGHTS)
        if outputs == classes + 1:
            return CrossEntropyCriterion(*DETR_WEIGHTS, *DETR_WEIGHTS)
        raise DetectorLoadError(
            f"{what} has {outputs} outputs a query for {classes} classes: one a class, or one more for no object, can "
            "be read"
        )

    def criterion(self) -> DetectionCriterion:
        """How its scores are read, and by which costs ground truth is assigned to its predictions."""
        return self._criterion

    @property
    def scores(self) -> Scores:
        """How its class logits are read: of all its classes, or of those that `read_classes` left."""
        scores = self._criterion.scores
        return scores if self._read is None else SelectedScores(scores, self._read)

    def read_classes(self, index: torch.Tensor, names: list[str]) -> None:
        """Let detections be of these classes alone; as `Detector`."""
        self._read, self.class_names = index.tolist(), list(names)

    def to_stock(self) -> PreTrainedModel:
        """The model as it is."""
        return self.model

    def check_image(self, height: int, width: int) -> None:
        """Refuses no size: it is not known which ones such a model takes."""

    def static_queries(self) -> None:
        """None: it has no queries that another decoder could take."""

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest):
        """Its predictions as one layer's of its own group; maps that are asked for are not there.

        Such a model knows no padding: its boxes are shares of the whole canvas, and become shares of the image here.
        """
        output = self.model(pixel_values=pixel_values)
        boxes = wide(output.pred_boxes)
        if pixel_mask is not None:
            rows, columns = valid_sizes(pixel_mask.bool())
            height, width = pixel_mask.shape[1:]
            scale = torch.stack([width / columns, height / rows], dim=-1).repeat(1, 2)
            boxes = boxes * scale[:, None].to(boxes.dtype)
        return DetectorOutput(groups={OWN: GroupOutput(logits=wide(output.logits)[None], boxes=boxes[None])})


def load_other_detector(path: str, model_type: str, role: str = "teacher") -> OtherDetector:
    """Load a checkpoint of no family here, for its predictions.

    Args:
        path: a folder or Hub id.
        model_type: as Transformers calls it.
        role: what it is for, as the errors call it.

    Raises:
        DetectorLoadError: `AutoModelForObjectDetection` loads nothing from there, or it cannot teach.
    """
    what = f"{role} {path!r}"
    config = read_config(path, what)
    names = check_weight_files(path, what, build_on_meta(AutoModelForObjectDetection.from_config, config, what))
    with (
        quiet_loading(),
        library_errors(f"{what} is a {model_type!r} model, which Transformers does not load as a detector"),
    ):
        model, info = AutoModelForObjectDetection.from_pretrained(
            path,
            config=config,
            key_mapping=names or None,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # which are told by name below
        )
    check_loaded(model, info, what)
    return OtherDetector(model, role)
