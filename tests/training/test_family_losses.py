"""What ground truth teaches a student of each family, through the trainer, is what its stock class is taught."""

import pytest
import torch

from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import random_labels, tiny_model

SIZE, OBJECTS = (64, 64), [3, 0, 2]


def examples(objects: list[int]) -> list[dict]:
    """Images of one size: most of these families know no padding."""
    generator = torch.Generator().manual_seed(4)
    labels = random_labels(objects, seed=3)
    return [
        {
            "pixel_values": torch.randn(3, *SIZE, generator=generator),
            "labels": label | {"orig_size": torch.tensor(SIZE)},
        }
        for label in labels
    ]


def logged(model, images: list[dict], folder, **options) -> dict[str, float]:
    """Every term of one training batch, layer by layer, and their sum; the auxiliary group is off unless asked for."""
    off = {"auxiliary_queries": "none", "adaptive_matching": False}
    args = D3etrTrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, log_each_layer=True, **(off | options)
    )
    trainer = D3etrTrainer(model=model, args=args)
    batch = trainer.data_collator(images)
    torch.manual_seed(7)  # denoising queries are drawn
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    trainer.log({"loss": float(loss.detach())})
    return trainer.state.log_history[-1]


def hybrid_terms(loss_dict: dict[str, torch.Tensor], layers: int, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """RT-DETR's dictionary, whose values are weighted, under our names."""
    terms = {}
    for term, stock in names.items():
        for layer in range(layers):
            suffix = "" if layer == layers - 1 else f"_aux_{layer}"
            terms[f"student/{term}/layer_{layer}"] = loss_dict[f"{stock}{suffix}"]
            if f"{stock}_dn_{layer}" in loss_dict:
                terms[f"denoising/{term}/layer_{layer}"] = loss_dict[f"{stock}_dn_{layer}"]
        terms[f"proposals/{term}/layer_0"] = loss_dict[f"{stock}_aux_{layers - 1}"]
    return terms


RT_DETR_NAMES = {"class": "loss_vfl", "l1": "loss_bbox", "giou": "loss_giou"}


@pytest.mark.parametrize("objects", [OBJECTS, [0, 0]], ids=["objects", "no object"])
@pytest.mark.parametrize("denoising", [10, 0])
@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2"])
def test_every_term_of_rt_detr_is_the_stock_classes(family, denoising, objects, tmp_path):
    """With no object in the batch the class embedding of denoising queries has a gradient, or processes would wait."""
    weights = {"weight_loss_vfl": 1.5, "weight_loss_bbox": 4.0, "weight_loss_giou": 3.0}
    model = tiny_model(model_type=family, num_denoising=denoising, **weights)
    images = examples(objects)
    stock = model.to_stock().train()
    torch.manual_seed(7)
    pixels = torch.stack([image["pixel_values"] for image in images])
    expected = stock(pixels, labels=[image["labels"] for image in images])
    found = logged(model, images, tmp_path)
    terms = hybrid_terms(expected.loss_dict, model.decoder_depth, RT_DETR_NAMES)
    assert set(terms) == {name.removeprefix("loss/") for name in found if "/layer_" in name}
    for name, value in terms.items():
        assert found[f"loss/{name}"] == pytest.approx(float(value.detach()), rel=1e-4, abs=1e-5), name
    assert found["loss"] == pytest.approx(float(expected.loss.detach()), rel=1e-4)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("family", "averaged"), [("d_fine", "first_head"), ("rf_detr", "further_groups")])
def test_averaged_groups_average_all_that_is_predicted_of_groups(family, averaged, tmp_path):
    """Group by group, whatever of them is supervised beside their layers; the encoder's proposals are no group's."""
    found = []
    groups = {"auxiliary_queries": "learned", "auxiliary_groups": 2}
    for reduction in ("sum", "mean"):
        model = tiny_model(model_type=family)
        options = groups | {"group_reduction": reduction}
        found.append(logged(model, examples(OBJECTS), tmp_path / reduction, **options))
    for name, share in (("student", 1 / 3), (averaged, 1 / 3), ("auxiliary_2", 1 / 3), ("proposals", 1.0)):
        assert found[1][f"loss/{name}/l1"] == pytest.approx(share * found[0][f"loss/{name}/l1"], rel=1e-4), name
    options = groups | {"detection_weight": 0.3}
    light = logged(tiny_model(model_type=family), examples(OBJECTS), tmp_path / "light", **options)
    for name in ("student", averaged, "proposals"):
        assert light[f"loss/{name}/l1"] == pytest.approx(0.3 * found[0][f"loss/{name}/l1"], rel=1e-4), name
