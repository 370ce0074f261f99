"""Table Transformer against its stock class: DETR's fault of `auxiliary_loss` (HF_NOTES 1), norms before attention."""

import math

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, TableTransformerForObjectDetection

from d3etr_hf.models import D3etrTableTransformerForObjectDetection
from d3etr_hf.outputs import AUXILIARY, OWN, GroupRequest, Queries
from tests.models.test_own_attention import close, stock_twin
from tests.tiny import padded_batch, random_labels, random_queries, request_for, targets_of, tiny_config
from tests.tiny import tiny_model as tiny_model_of

BATCH = padded_batch()


def tiny_model(seed: int = 0, **changes) -> D3etrTableTransformerForObjectDetection:
    return tiny_model_of(seed, "table-transformer", **changes)


@pytest.mark.parametrize("auxiliary_loss", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_variant_equals_stock(auxiliary_loss, training):
    options = {"position_embedding_type": "learned", "activation_function": "prelu", "auxiliary_loss": auxiliary_loss}
    model = tiny_model(dropout=0.2, attention_dropout=0.2, **options).train(training)
    twin = stock_twin(model)
    torch.manual_seed(3)
    stock = twin(**BATCH)
    torch.manual_seed(3)
    group = model(**BATCH, request=GroupRequest()).groups[OWN]
    close(group.logits[-1], stock.logits)
    close(group.boxes[-1], stock.pred_boxes)


def test_layer_predictions_are_normed_once_on_the_side():
    model = tiny_model()
    twin = stock_twin(model)
    raw = twin.model(**BATCH, output_hidden_states=True).decoder_hidden_states
    hidden = torch.stack([twin.model.decoder.layernorm(h) for h in raw[1:-1]] + [raw[-1]])
    group = model(**BATCH, request=GroupRequest()).groups[OWN]
    close(group.logits, twin.class_labels_classifier(hidden))
    close(group.boxes, twin.bbox_predictor(hidden).sigmoid())
    assert (group.logits[0] - group.logits[-1]).abs().max() > 0.01
    assert (group.logits - tiny_model(auxiliary_loss=True)(**BATCH, request=GroupRequest()).groups[OWN].logits).any()


def test_unweighted_losses_of_all_layers_are_the_stock_ones():
    """Of a checkpoint trained as Transformers trains: norms feed the next layer."""
    labels = random_labels([2, 3])
    model = tiny_model(auxiliary_loss=True, eos_coefficient=0.3)
    stock = stock_twin(model)(**BATCH, labels=labels)
    group = model(**BATCH, request=GroupRequest()).groups[OWN]
    for layer, outputs in enumerate(stock.auxiliary_outputs):
        close(group.logits[layer], outputs["logits"])
        close(group.boxes[layer], outputs["pred_boxes"])
    criterion, targets = model.criterion(), targets_of(labels)
    losses = criterion.losses(group, targets, criterion.assign(group, targets))
    for name, theirs, divisor in (
        ("class", "loss_ce", 5 + 0.3 * (14 - 5)),
        ("l1", "loss_bbox", 5),
        ("giou", "loss_giou", 5),
    ):
        expected = torch.stack([stock.loss_dict[f"{theirs}_{layer}"] for layer in (0, 1)] + [stock.loss_dict[theirs]])
        torch.testing.assert_close(losses[name] / divisor, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", ["position", "content"])
def test_a_further_group_is_what_stock_computes_of_its_queries(known):
    """Another family's content serves as positions where it has none; anchors are of no use."""
    model, position = tiny_model(), random_queries().position
    twin = stock_twin(model)
    twin.model.query_position_embeddings.weight = nn.Parameter(position)
    stock = twin(**BATCH, output_attentions=True)
    queries = Queries(**{known: position}, anchors=torch.rand(5, 4))
    group = model(**BATCH, request=request_for({AUXILIARY: queries}, maps=True)).groups[AUXILIARY]
    close(group.logits[-1], stock.logits)
    close(group.boxes[-1], stock.pred_boxes)
    for layer in range(3):
        close(group.self_attention[layer].probability, stock.decoder_attentions[layer])
        close(group.cross_attention[layer].probability, stock.cross_attentions[layer])


def test_start_values_are_detrs(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(
        "table-transformer",
        d_model=64,
        num_queries=300,
        activation_function="prelu",
        position_embedding_type="learned",
    )
    model = D3etrTableTransformerForObjectDetection(config)
    assert 0.95 < float(model.model.query_position_embeddings.weight.detach().std()) < 1.05
    layer = model.model.decoder.layers[1]
    assert float(layer.self_attn.q_proj.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / 128), rel=0.01)
    assert layer.self_attn.q_proj.bias.abs().max() == layer.fc1.bias.abs().max() == 0
    assert torch.all(layer.self_attn_layer_norm.weight == 1) and torch.all(layer.activation_fn.weight == 0.25)
    rows = model.model.backbone.position_embedding.row_embeddings.weight.detach()
    assert 0 <= rows.min() < 0.05 and 0.95 < rows.max() <= 1
    stock = TableTransformerForObjectDetection(config)
    assert float(stock.model.query_position_embeddings.weight.detach().std()) < 0.05, "superfluous by now?"


def test_stem_and_first_stage_of_a_resnet_are_frozen(tmp_path):
    """Transformers freezes the whole of it when it is built and nothing when it is loaded (HF_NOTES 2)."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    model = tiny_model(backbone_config=backbone)
    model.save_pretrained(tmp_path)
    for each in (model, D3etrTableTransformerForObjectDetection.from_pretrained(tmp_path)):
        parameters = dict(each.backbone_module.named_parameters())
        frozen = {name for name, value in parameters.items() if not value.requires_grad}
        assert frozen == {name for name in parameters if name.startswith(("embedder.", "encoder.stages.0."))}
        assert frozen and frozen != set(parameters)


def test_layers_that_training_skips_are_told():
    assert tiny_model().skipped_layers is None
    assert tiny_model(decoder_layerdrop=0.25).skipped_layers == "decoder_layerdrop is 0.25"
