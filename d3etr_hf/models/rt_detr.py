"""RT-DETR (Zhao et al., CVPR 2024)."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import RTDetrForObjectDetection
from transformers.models.rt_detr.modeling_rt_detr import (
    RTDetrDecoder,
    RTDetrMultiscaleDeformableAttention,
    eager_attention_forward,
)

from d3etr_hf.errors import ImageSizeError
from d3etr_hf.losses import DetectionCriterion, VarifocalCriterion
from d3etr_hf.models.detector import BACKBONE, DECODER, ENCODER, HEADS, QUERIES
from d3etr_hf.models.group_attention import GroupAttention
from d3etr_hf.models.group_decoder import DecoderPass, GroupDecoder, sampled_in
from d3etr_hf.models.initialisation import freeze_stem, start_as_multihead_attention, start_at_prior
from d3etr_hf.models.query_adapters import boxes_of
from d3etr_hf.models.sampled_memory import SampledMemoryDetector, labels_of
from d3etr_hf.outputs import (
    NO_OBJECT,
    OWN,
    DetectorOutput,
    GroupOutput,
    GroupRequest,
    Queries,
    SampledAttention,
    Supervised,
)

DENOISING = "denoising"


class ProposalDecoder(GroupDecoder):
    """The queries of RT-DETR and its heirs: content and boxes before the sigmoid, denoising ones first."""

    query_arguments = ("inputs_embeds", "reference_points")
    config: Any
    layers: Any

    def own_groups(self, count: int) -> dict[str, int]:
        denoising = count - self.config.num_queries
        return ({DENOISING: denoising} if denoising else {}) | {OWN: self.config.num_queries}

    def see(self, groups: GroupAttention, arguments: dict[str, Any]) -> None:
        """Denoising queries see the model's own; which of each other, the mask says (0, or minus infinity)."""
        mask = arguments.pop("encoder_attention_mask", None)
        if mask is not None:
            groups.sees[DENOISING] = (DENOISING, OWN)
            groups.masks[DENOISING] = mask[: groups.sizes[DENOISING]] == 0

    def queries_from(self, arguments) -> Queries:
        return Queries(content=arguments["inputs_embeds"], anchors=arguments["reference_points"].sigmoid())

    def arguments_from(self, queries: Queries) -> dict[str, torch.Tensor]:
        content = queries.position if queries.content is None else queries.content
        return {"inputs_embeds": content, "reference_points": boxes_of(queries).logit(1e-5)}


class GroupRTDetrDecoder(ProposalDecoder, RTDetrDecoder):
    """RT-DETR's decoder for several groups."""

    def sampling_modules(self) -> list[nn.Module]:
        return [layer.get_submodule("encoder_attn.attn") for layer in self.layers]

    def sampled_by(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output) -> SampledAttention:
        return sampled_in(*args[4:6])


class ProposalDetector(SampledMemoryDetector):
    """RT-DETR and its heirs: queries are the encoder's best proposals.

    In training their denoising queries are a group of their own, which only ground truth supervises.

    Attributes:
        stock_starts: classes of the decoder's modules that Transformers starts as the authors do.
    """

    stock_starts: ClassVar[tuple[type[nn.Module], ...]]
    parts = {
        BACKBONE: ("model.backbone.",),
        ENCODER: ("model.encoder.", "model.encoder_input_proj."),
        HEADS: ("model.decoder.class_embed.", "model.decoder.bbox_embed."),
        DECODER: ("model.decoder.layers.", "model.decoder.query_pos_head.", "model.decoder_input_proj."),
        QUERIES: ("model.enc_", "model.denoising_class_embed.", "model.weight_embedding."),
    }
    class_outputs: ClassVar[tuple[str, ...]] = (
        "model.decoder.class_embed.",
        "model.enc_score_head",
        "model.denoising_class_embed",
    )
    layer_modules: ClassVar[tuple[str, ...]] = (
        "model.decoder.layers.",
        "model.decoder.class_embed.",
        "model.decoder.bbox_embed.",
    )

    @classmethod
    def check_config(cls, config) -> None:
        width, levels = config.encoder_hidden_dim, cls.levels_of(config)
        method = getattr(config, "decoder_method", "default")  # of its heirs
        if method not in ("default", "discrete"):
            raise ValueError(f"decoder_method is {method!r}: there are default and discrete")
        if width % 4 or (config.encoder_layers and width % config.encoder_attention_heads):
            raise ValueError(
                f"encoder_hidden_dim {width} must be a multiple of 4, for its sine embeddings, and of "
                f"encoder_attention_heads, which is {config.encoder_attention_heads}"
            )
        read = len(config.backbone_config.out_indices)
        if len(config.encoder_in_channels) != read:
            raise ValueError(
                f"encoder_in_channels {list(config.encoder_in_channels)}: the backbone gives {read} levels"
            )
        if list(config.decoder_in_channels) != [width] * levels:
            raise ValueError(
                f"decoder_in_channels {list(config.decoder_in_channels)} must hold encoder_hidden_dim, {width}, for "
                f"each of the encoder's {levels} levels"
            )
        if config.num_feature_levels < levels or len(config.feat_strides) < levels:
            raise ValueError(
                f"num_feature_levels {config.num_feature_levels} and feat_strides {list(config.feat_strides)} must be "
                f"of the encoder's {levels} levels at least"
            )
        if not all(0 <= level < levels for level in config.encode_proj_layers):
            raise ValueError(f"encode_proj_layers {config.encode_proj_layers}: there are levels 0 to {levels - 1}")
        if config.learn_initial_query:
            raise ValueError("learn_initial_query must be false: Transformers' forward pass fails with it")
        if not config.use_focal_loss:
            raise ValueError("use_focal_loss must be true: ground truth is assigned by focal costs")

    @classmethod
    def levels_of(cls, config) -> int:
        """How many feature maps the encoder gives."""
        return len(config.encoder_in_channels)

    @property
    def backbone_module(self) -> nn.Module:
        return self.model.backbone.model

    @property
    def side_divisor(self) -> int:
        """The coarsest stride of the encoder, whose levels are added to one another: each must double the next."""
        levels = self.levels_of(self.config)
        return self.config.feat_strides[levels - 1] if levels > 1 else 1

    @property
    def only_size(self) -> tuple[int, int] | None:
        height, width = self.config.anchor_image_size or (0, 0)
        return (height, width) if height and width else None

    def check_image(self, height: int, width: int) -> None:
        if height % self.side_divisor or width % self.side_divisor:
            raise ImageSizeError(
                f"an image of {width} x {height} pixels: {self.title}'s encoder adds levels of doubling strides, so "
                f"both sides must be multiples of {self.side_divisor}; resize images to such a size"
            )
        tokens = sum((height // stride) * (width // stride) for stride in self.config.feat_strides)
        self.check_tokens(tokens, height, width)

    def forward_groups(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None, request: GroupRequest
    ) -> DetectorOutput:
        size, only = tuple(pixel_values.shape[-2:]), self.only_size
        if only is not None and not self.training and size != only:
            raise ImageSizeError(
                f"an image of {size[1]} x {size[0]} pixels: anchor_image_size in its config.json holds it to "
                f"{only[1]} x {only[0]} pixels; resize images to that, or set it to null there"
            )
        return super().forward_groups(pixel_values, pixel_mask, request)

    def try_image(self, pixel_values: torch.Tensor) -> DetectorOutput:
        """The strides decide which images are taken, so they must be those of the memory."""
        height, width = pixel_values.shape[-2:]
        found: list[tuple[int, ...]] = []

        def keep(decoder: nn.Module, args: tuple, arguments: dict[str, Any]) -> None:
            found.extend(tuple(shape) for shape in arguments["spatial_shapes_list"])

        with self.model.decoder.register_forward_pre_hook(keep, with_kwargs=True):
            output = super().try_image(pixel_values)
        expected = [(height // stride, width // stride) for stride in self.config.feat_strides]
        if any(shape != wanted for shape, wanted in zip(found, expected, strict=False)):
            raise ValueError(
                f"feat_strides {list(self.config.feat_strides)} are not the backbone's: the memory of an image of "
                f"{width} x {height} pixels has levels of {found}"
            )
        return output

    def model_arguments(self, request: GroupRequest) -> dict[str, Any]:
        """The ground truth of which denoising queries are made."""
        targets = request.targets if self.training else None
        return {"labels": None if targets is None else labels_of(targets)}

    def predictions(self, output, decoder_pass: DecoderPass) -> tuple[torch.Tensor, ...]:
        return output.intermediate_logits.transpose(0, 1), output.intermediate_reference_points.transpose(0, 1)

    def supervised(
        self, outputs: dict[str, GroupOutput], output, decoder_pass: DecoderPass, request: GroupRequest
    ) -> dict[str, Supervised]:
        """The encoder's chosen proposals, and denoising queries as far as there are any."""
        proposals = GroupOutput(logits=output.enc_topk_logits[None], boxes=output.enc_topk_bboxes[None])
        found = {"proposals": Supervised(group=proposals)}
        meta = output.denoising_meta_values
        if meta is not None:
            found[DENOISING] = self._denoised(outputs[DENOISING], meta)
        elif self.config.num_denoising > 0:
            # no object in this process's batch: its class embedding has a gradient all the same, or others would wait
            nothing = 0 * self.model.denoising_class_embed.weight.sum()
            outputs[OWN].logits = outputs[OWN].logits + nothing
        return found

    @staticmethod
    def _denoised(group: GroupOutput, meta: dict[str, Any]) -> Supervised:
        """Denoising queries and the objects that they were made of, repeated group by group."""
        layers, batch, queries = group.boxes.shape[:3]
        assignment = torch.full((batch, queries), NO_OBJECT, device=group.boxes.device)
        for image, positive in enumerate(meta["dn_positive_idx"]):
            objects = len(positive) // meta["dn_num_group"]
            assignment[image, positive] = torch.arange(objects, device=positive.device).tile(meta["dn_num_group"])
        return Supervised(assignment.expand(layers, -1, -1), group, repeats=meta["dn_num_group"])

    def criterion(self) -> DetectionCriterion:
        config = self.config
        return VarifocalCriterion(
            class_cost=config.matcher_class_cost,
            l1_cost=config.matcher_bbox_cost,
            giou_cost=config.matcher_giou_cost,
            class_weight=config.weight_loss_vfl,
            l1_weight=config.weight_loss_bbox,
            giou_weight=config.weight_loss_giou,
            cost_alpha=config.matcher_alpha,
            cost_gamma=config.matcher_gamma,
            background_alpha=config.focal_loss_alpha,
            background_gamma=config.focal_loss_gamma,
        )

    def start_values(self) -> None:
        """Boxes start at their anchors and classes at a prior of 0.01; sampling as in Deformable DETR."""
        decoder = self.model.decoder
        for module in decoder.modules():
            if isinstance(module, self.stock_starts):
                self._init_weights(module)
        for part in (self.model.encoder, decoder):
            for name, module in part.named_modules():
                if name.endswith("self_attn"):
                    start_as_multihead_attention(module)
        for head in (*decoder.class_embed, self.model.enc_score_head):
            start_at_prior(head)
        for head in (*decoder.bbox_embed, self.model.enc_bbox_head):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for layer in (self.model.enc_output[0], *decoder.query_pos_head.layers):
            nn.init.xavier_uniform_(layer.weight)

    def freeze(self) -> None:
        freeze_stem(self, self.backbone_module, self.config)


def check_tied_heads(config) -> None:
    """Refuse what heirs whose heads have two names in Transformers do not take.

    Raises:
        ValueError: the message names the field and its value.
    """
    if config.decoder_layers < 2:
        raise ValueError(f"decoder_layers is {config.decoder_layers}: Transformers ties the heads of two or more only")
    if not config.tie_word_embeddings:
        raise ValueError(
            "tie_word_embeddings must be true: otherwise heads that nothing reads stand beside those used"
        )


class D3etrRTDetrForObjectDetection(ProposalDetector, RTDetrForObjectDetection):
    """`RTDetrForObjectDetection` with further query groups and attention on demand; see `Detector`."""

    stock_class = RTDetrForObjectDetection
    title = "RT-DETR"
    tag = "rt-detr"
    citation = """@inproceedings{zhao2024detrs,
  title={{DETRs} Beat {YOLOs} on Real-time Object Detection},
  author={Zhao, Yian and Lv, Wenyu and Xu, Shangliang and Wei, Jinman and Wang, Guanzhong and Dang, Qingqing and
    Liu, Yi and Chen, Jie},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}"""
    group_decoder = GroupRTDetrDecoder
    eager_attention = staticmethod(eager_attention_forward)
    stock_starts = (RTDetrMultiscaleDeformableAttention,)
