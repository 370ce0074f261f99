"""What is told of decoder layers: their AP against models of fewer layers, attention against loops over keys."""

import pytest
import torch

from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.evaluation import predict_detections, structure
from d3etr_hf.evaluation.structure import cells_in_objects, layer_structures, sinks
from d3etr_hf.models.image_processors import image_processor_of
from d3etr_hf.outputs import OWN, GroupRequest, SampledAttention, Targets
from tests.tiny import perturb, tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 1, 6, image_size=64, progress=False)


@pytest.mark.parametrize("model_type", ["conditional_detr", "rt_detr"])
def test_layers(shapes, model_type, monkeypatch):
    """AP of layer k is that of the model whose decoder ends there; attention is what a loop over images sees.

    A model that has learned nothing detects nothing: instead of AP all detections count.
    """
    measured = []
    monkeypatch.setattr(
        structure,
        "average_precision_of",
        lambda found, dataset: measured.append(found) or {"AP": len(measured), "AP50": len(dataset)},
    )
    model = perturb(tiny_model(model_type=model_type), 0.3).eval()
    options = {"image_size": 64} if model_type == "rt_detr" else {"short_side": 64, "long_side": 64}
    processor = image_processor_of(model_type, None, **options)
    _, val = load_splits(DataArguments(data_folder=str(shapes)), processor)
    layers = layer_structures(model, val, batch_size=4)
    assert [(layer.AP, layer.AP50) for layer in layers] == [(1, 6), (2, 6), (3, 6)]
    for index, layer in enumerate(layers):
        expected = predict_detections(CutAt(model, index), val, batch_size=4)  # by fused attention
        assert torch.allclose(measured[index], expected, atol=0.02)  # pixels
        assert layer.cross_sink_mass <= 1 and 0 < layer.object_area < 1
    seen = []
    for image in range(len(val)):
        pixels = val[image]["pixel_values"][None]
        mask = torch.ones_like(pixels[:, 0], dtype=torch.int64)
        output = model(pixels, mask, request=GroupRequest(cross_attention=True))
        cross = output.groups[OWN].cross_attention[-1]
        cross = cross.on_grid(output.memory_mask) if isinstance(cross, SampledAttention) else cross
        height, width = output.memory_mask.shape[1:]
        grid = cross.probability.detach().mean((0, 1, 2)).reshape(height, width)
        boxes, on_objects = val[image]["labels"]["boxes"].tolist(), 0.0
        for row in range(height):
            for column in range(width):
                x, y = (column + 0.5) / width, (row + 0.5) / height
                if any(abs(x - b[0]) <= b[2] / 2 and abs(y - b[1]) <= b[3] / 2 for b in boxes):
                    on_objects += float(grid[row, column])
        seen.append(on_objects)
    assert layers[-1].cross_on_objects == pytest.approx(sum(seen) / len(seen), abs=1e-5)


class CutAt(torch.nn.Module):
    """A detector as if its decoder ended after this layer."""

    def __init__(self, model, layer):
        super().__init__()
        self.model, self.layer, self.scores, self.dtype, self.device = model, layer, model.scores, model.dtype, "cpu"

    def forward(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        group = output.groups[OWN]
        group.logits, group.boxes = group.logits[: self.layer + 1], group.boxes[: self.layer + 1]
        return output


def test_sinks():
    """A key with three times its even share is none yet; padding takes no part in what is even."""
    received = torch.tensor([[0.62, 0.02, *[0.04] * 9, 0.0], [0.25, 0.75, *[0.0] * 10]])
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, -1] = False
    valid[1, 4:] = False
    assert torch.allclose(sinks(received, valid), torch.tensor([[1, 0.62], [0, 0]]))
    received[1, :2] = torch.tensor([0.2, 0.8])
    assert torch.allclose(sinks(received, valid)[1], torch.tensor([1, 0.8]))


def test_cells_in_objects():
    """Counted from the unpadded image; what fills up the list of objects is none."""
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0], mask[1, :2, :4] = True, True
    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1, 1]], [[0.875, 0.5, 0.25, 1], [0.5, 0.5, 1, 1]]])
    inside = cells_in_objects(Targets(torch.zeros(2, 2, dtype=torch.int64), boxes, [1, 1]), mask).reshape(2, 4, 4)
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, :2, :2] = True
    expected[1, :2, 3] = True
    assert torch.equal(inside, expected)
