"""D-FINE (Peng et al., ICLR 2025)."""

from typing import Any

import torch
from torch import nn
from transformers import DFineForObjectDetection
from transformers.loss.loss_d_fine import weighting_function
from transformers.models.d_fine.modeling_d_fine import (
    DFineDecoder,
    DFineGate,
    DFineLQE,
    DFineMultiscaleDeformableAttention,
    eager_attention_forward,
)

from d3etr_hf.losses import DetectionCriterion, DistributionCriterion
from d3etr_hf.models.detector import HEADS
from d3etr_hf.models.group_decoder import DecoderPass, sampled_around
from d3etr_hf.models.rt_detr import DENOISING, ProposalDecoder, ProposalDetector, check_tied_heads
from d3etr_hf.outputs import (
    MOST_AUXILIARY_GROUPS,
    OWN,
    GroupOutput,
    GroupRequest,
    SampledAttention,
    Supervised,
    auxiliary_names,
    wide,
)

FIRST_HEAD = "first_head"


def first_head_of(group: str) -> str:
    """What the predictions of the first layer's own head are called, by the group's name."""
    return FIRST_HEAD if group == OWN else f"{group}_{FIRST_HEAD}"


# predictions of the same queries
SHARED_QUERIES = (
    (OWN, first_head_of(OWN), "proposals"),
    *((name, first_head_of(name)) for name in auxiliary_names(MOST_AUXILIARY_GROUPS)),
)
# groups whose first head ground truth supervises
WITH_FIRST_HEAD = (OWN, DENOISING, *auxiliary_names(MOST_AUXILIARY_GROUPS))


class DistributionDecoder(ProposalDecoder):
    """The decoder of D-FINE and its heirs: with several groups it predicts in all layers, in evaluation as well."""

    def forward(self, *args, **kwargs):
        """As the stock decoder: its own module alone reads `training` to skip the heads of early layers."""
        training = self.training
        self.training = training or self.going_on is not None
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training

    def sampling_modules(self) -> list[nn.Module]:
        return [layer.get_submodule("encoder_attn") for layer in self.layers]

    def sampled_by(self, module: Any, args: tuple, kwargs: dict[str, Any], output) -> SampledAttention:
        """The places are computed once more: the stock module keeps them to itself."""
        weights = output[1]
        offsets = module.sampling_offsets(kwargs["hidden_states"]).reshape(*weights.shape, 2)
        scale = module.offset_scale * module.num_points_scale.to(offsets.dtype)[:, None]
        discrete = module.decoder_method == "discrete"
        nearest = (module.num_points_list, kwargs["spatial_shapes_list"]) if discrete else None
        return sampled_around(kwargs["reference_points"], offsets * scale, weights, nearest)


class GroupDFineDecoder(DistributionDecoder, DFineDecoder):
    """D-FINE's decoder for several groups."""


class DistributionDetector(ProposalDetector):
    """D-FINE and its heirs: RT-DETR whose boxes come from distributions over the distances of their edges.

    The prediction of the first layer's own head, from which those distances are counted, is no decoder layer's: ground
    truth alone supervises it.
    """

    predicts_distributions = True
    parts = ProposalDetector.parts | {
        HEADS: (
            *ProposalDetector.parts[HEADS],
            "class_embed.",
            "bbox_embed.",
            "model.decoder.pre_bbox_head.",
            "model.decoder.lqe_layers.",
            "model.decoder.reg_scale",
            "model.decoder.up",
        ),
    }
    class_outputs = ("class_embed.", *ProposalDetector.class_outputs)
    layer_modules = ("class_embed.", "bbox_embed.", "model.decoder.lqe_layers.", *ProposalDetector.layer_modules)

    @classmethod
    def check_config(cls, config) -> None:
        super().check_config(config)
        check_tied_heads(config)
        if config.eval_idx % config.decoder_layers != config.decoder_layers - 1:
            raise ValueError(
                f"eval_idx {config.eval_idx} must be the last of {config.decoder_layers} decoder layers: Transformers "
                "builds layers after it that have no heads"
            )
        if config.max_num_bins % 2 or config.max_num_bins < 4:
            raise ValueError(f"max_num_bins {config.max_num_bins} must be an even number from 4")
        if not 0 < config.top_prob_values <= config.max_num_bins + 1:
            raise ValueError(f"top_prob_values {config.top_prob_values} must be in 1..max_num_bins + 1")

    def predictions(self, output, decoder_pass: DecoderPass) -> tuple[torch.Tensor, ...]:
        logits, boxes = super().predictions(output, decoder_pass)
        decoder, config = self.model.decoder, self.config
        corners = output.intermediate_predicted_corners.transpose(0, 1)
        distances = weighting_function(config.max_num_bins, decoder.up, decoder.reg_scale)
        return (
            logits[1:],  # after that of the first layer's own head
            boxes[1:],
            corners.unflatten(-1, (4, -1)),
            output.initial_reference_points[:, 0],  # the same for all layers
            wide(distances / decoder.reg_scale),
        )

    def supervised(
        self, outputs: dict[str, GroupOutput], output, decoder_pass: DecoderPass, request: GroupRequest
    ) -> dict[str, Supervised]:
        """What RT-DETR has, and for each group the prediction of the first layer's own head."""
        found = super().supervised(outputs, output, decoder_pass, request)
        logits, boxes = super().predictions(output, decoder_pass)
        for name, group in decoder_pass.outputs(logits[:1], boxes[:1]).items():
            if name not in WITH_FIRST_HEAD:
                continue
            first = GroupOutput(logits=group.logits, boxes=group.boxes)
            given = name == DENOISING
            found[first_head_of(name)] = (
                self._denoised(first, output.denoising_meta_values)
                if given
                else Supervised(group=first, of_group=True)
            )
        return found

    def criterion(self) -> DetectionCriterion:
        return self._criterion(self.config.weight_loss_vfl, unions=True)

    def _criterion(self, class_weight: float, unions: bool, **class_loss) -> DetectionCriterion:
        """The criterion with these settings of its class loss."""
        config = self.config
        return DistributionCriterion(
            class_cost=config.matcher_class_cost,
            l1_cost=config.matcher_bbox_cost,
            giou_cost=config.matcher_giou_cost,
            class_weight=class_weight,
            l1_weight=config.weight_loss_bbox,
            giou_weight=config.weight_loss_giou,
            cost_alpha=config.matcher_alpha,
            cost_gamma=config.matcher_gamma,
            fgl_weight=config.weight_loss_fgl,
            ddf_weight=config.weight_loss_ddf,
            shared_queries=SHARED_QUERIES if unions else (),
            background_gamma=config.focal_loss_gamma,
            **({"background_alpha": config.focal_loss_alpha} | class_loss),
        )

    def start_values(self) -> None:
        """As in RT-DETR; the first layer's own head starts at the anchors, gates open by half, qualities at zero."""
        super().start_values()
        decoder = self.model.decoder
        nn.init.zeros_(decoder.pre_bbox_head.layers[-1].weight)
        nn.init.zeros_(decoder.pre_bbox_head.layers[-1].bias)

    def freeze(self) -> None:
        """What RT-DETR freezes, how far bins reach, and places that are rounded."""
        super().freeze()
        decoder = self.model.decoder
        decoder.reg_scale.requires_grad_(False)
        decoder.up.requires_grad_(False)
        if self.config.decoder_method == "discrete":
            for layer in decoder.layers:
                layer.encoder_attn.sampling_offsets.requires_grad_(False)


class D3etrDFineForObjectDetection(DistributionDetector, DFineForObjectDetection):
    """`DFineForObjectDetection` with further query groups and attention on demand; see `Detector`.

    Trains as its authors' code does where Transformers' loss does not: distributions go with the predictions of their
    own layer (there with those of the layer before; the last has none, and the last but one has no loss at all), and
    losses of boxes take the union of all layers' assignments. How much "ddf" weighs queries that hold an object is
    counted in each group, as in Transformers; the authors' denoising queries take the count of the model's own.
    """

    stock_class = DFineForObjectDetection
    title = "D-FINE"
    tag = "d-fine"
    citation = """@inproceedings{peng2025dfine,
  title={{D-FINE}: Redefine Regression Task in {DETRs} as Fine-grained Distribution Refinement},
  author={Peng, Yansong and Li, Hebei and Wu, Peixi and Zhang, Yueyi and Sun, Xiaoyan and Wu, Feng},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""
    group_decoder = GroupDFineDecoder
    eager_attention = staticmethod(eager_attention_forward)
    stock_starts = (DFineDecoder, DFineGate, DFineLQE, DFineMultiscaleDeformableAttention)

    def start_values(self) -> None:
        super().start_values()
        for layer in self.model.decoder.layers:
            for linear in layer.mlp.layers:
                nn.init.xavier_uniform_(linear.weight)
