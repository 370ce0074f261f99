"""Start values and what trains, as in Conditional DETR's own code (HF_NOTES 2 and 3)."""

import math

import pytest
import torch
from transformers import ConditionalDetrForObjectDetection, ConvNextConfig, ResNetConfig

from d3etr_hf.models import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.loading import inherit_from_teacher
from d3etr_hf.outputs import OWN
from tests.tiny import normalisers_of, padded_batch, random_labels, request_for, targets_of, tiny_config, tiny_model


def resnet_config():
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    return tiny_config(backbone_config=backbone)


def trainable(model) -> set[str]:
    return {name for name, value in model.model.backbone.model.named_parameters() if value.requires_grad}


def test_start_values():
    torch.manual_seed(0)
    config = tiny_config(d_model=64, num_queries=300, num_labels=91)
    model = D3etrConditionalDetrForObjectDetection(config)
    queries = model.model.query_position_embeddings.weight
    assert 0.95 < float(queries.std()) < 1.05
    points = model.model.decoder.ref_point_head(queries).sigmoid()
    assert float(points.std(0).mean()) > 0.05  # stock: 0.0003, every query looks at the centre
    assert torch.all(model.class_labels_classifier.bias == -math.log(99))
    assert model.class_labels_classifier.weight.abs().max() > 0
    assert model.bbox_predictor.layers[-1].weight.abs().max() == 0
    assert model.bbox_predictor.layers[-1].bias.abs().max() == 0
    projection = model.model.decoder.layers[0].self_attn.q_content_proj.weight
    assert float(projection.abs().max()) == pytest.approx(math.sqrt(6 / (64 + 64)), rel=0.01)  # Xavier-uniform
    assert torch.all(model.model.encoder.layers[0].self_attn_layer_norm.weight == 1)


def test_first_class_loss_is_near_one():
    """Stock initialisation starts at about 1182 instead of 1.2 with 300 queries and 91 classes."""
    torch.manual_seed(0)
    model = D3etrConditionalDetrForObjectDetection(tiny_config(num_queries=300, num_labels=91)).eval()
    labels = random_labels([7, 8], classes=91)
    group = model(**padded_batch(), request=request_for()).groups[OWN]
    targets, criterion = targets_of(labels), model.criterion()
    losses = criterion.losses(group, targets, criterion.assign(group, targets))
    assert normalisers_of(criterion, [7, 8], 300)["class"] == 15
    assert 0.5 < float(losses["class"][-1].detach()) / 15 < 3


def test_resnet_freezes_stem_and_first_stage_when_built_and_when_loaded(tmp_path):
    """HF_NOTES 2: built, all 53 tensors come frozen; loaded, none."""
    model = D3etrConditionalDetrForObjectDetection(resnet_config())
    names = {name for name, _ in model.model.backbone.model.named_parameters()}
    expected = {name for name in names if not name.startswith(("embedder.", "encoder.stages.0."))}
    assert expected and expected != names and trainable(model) == expected
    model.save_pretrained(tmp_path)
    assert trainable(D3etrConditionalDetrForObjectDetection.from_pretrained(tmp_path)) == expected
    rest = [value for name, value in model.named_parameters() if ".backbone." not in name]
    assert all(value.requires_grad for value in rest)


def test_convnext_trains_whole():
    model = tiny_model()
    assert len(trainable(model)) == len(list(model.model.backbone.model.parameters()))


def test_new_class_head_of_a_loaded_model_starts_as_in_paper(tmp_path):
    """A checkpoint fine-tuned on other classes: the head that does not fit gets the focal prior, the rest is kept."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = D3etrConditionalDetrForObjectDetection.from_pretrained(
        tmp_path, id2label={i: f"class {i}" for i in range(5)}, ignore_mismatched_sizes=True
    )
    assert torch.all(loaded.class_labels_classifier.bias == -math.log(99))
    assert torch.equal(loaded.bbox_predictor.layers[0].weight, model.bbox_predictor.layers[0].weight)


def test_stock_initialisation_is_indeed_another():
    """If this fails Transformers has changed and `initialise` may be superfluous."""
    stock = ConditionalDetrForObjectDetection(tiny_config(num_queries=300))
    assert float(stock.model.query_position_embeddings.weight.detach().std()) < 0.05


def test_inheriting_copies_what_fits():
    teacher, student = tiny_model(seed=1, num_queries=9, decoder_layers=4), tiny_model(seed=2, decoder_layers=2)
    class_index, layer_map = torch.tensor([2, 0, 1]), [1, 3]
    own_queries = student.model.query_position_embeddings.weight.clone()
    copied, skipped = inherit_from_teacher(
        student, teacher, ["encoder", "decoder", "heads", "queries"], class_index, layer_map
    )
    assert torch.equal(
        student.model.decoder.layers[1].encoder_attn.v_proj.weight,
        teacher.model.decoder.layers[3].encoder_attn.v_proj.weight,
    )
    assert torch.equal(student.class_labels_classifier.bias, teacher.class_labels_classifier.bias[class_index])
    assert torch.equal(student.model.query_position_embeddings.weight, own_queries)
    assert "model.query_position_embeddings.weight" in skipped and "model.encoder.layers.0.mlp.fc1.weight" in copied
    # only a first layer has this projection, and the teacher's layer 1 is none
    assert torch.equal(
        student.model.decoder.layers[0].encoder_attn.q_pos_proj.weight,
        teacher.model.decoder.layers[0].encoder_attn.q_pos_proj.weight,
    )


def test_inheriting_nothing_is_refused():
    with pytest.raises(ValueError, match="inherit_from_teacher.*hidden size is 16"):
        inherit_from_teacher(tiny_model(), tiny_model(d_model=16), ["queries"], torch.arange(3), [0, 1, 2])


@pytest.mark.parametrize("unread", ["query scale", "last stage"])
def test_everything_that_trains_gets_a_gradient(unread):
    """Else two processes stop at the second step: a lone layer's query scale, stages after the last that is read."""
    if unread == "query scale":
        model = tiny_model(decoder_layers=1)
    else:
        backbone = ConvNextConfig(num_stages=3, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], out_features=["stage2"])
        model = tiny_model(backbone_config=backbone)
    group = model(**padded_batch(), request=request_for()).groups[OWN]
    (group.logits.sum() + group.boxes.sum()).backward()
    left = {name for name, value in model.named_parameters() if value.requires_grad and value.grad is None}
    assert not left
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen and all(("query_scale" if unread == "query scale" else "stages.2.") in name for name in frozen)
