import torch

from d3etr_hf.data.collate import DetectionCollator


def example(height: int, width: int, boxes: int) -> dict:
    generator = torch.Generator().manual_seed(height)
    return {
        "pixel_values": torch.rand(3, height, width, generator=generator) + 1,
        "labels": {
            "boxes": torch.rand(boxes, 4, generator=generator),
            "class_labels": torch.randint(9, (boxes,), generator=generator),
            "image_id": torch.tensor([height * 10]),
            "orig_size": torch.tensor([2 * height, 3 * width]),
        },
    }


def test_padding_is_zero_masked_and_at_the_right_and_bottom() -> None:
    """Guards against attention to padding, and against labels rescaled to the padded size."""
    examples = [example(4, 7, 2), example(6, 5, 0), example(3, 3, 1)]
    batch = DetectionCollator()(examples)
    assert batch["pixel_values"].shape == (3, 3, 6, 7) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_mask"].shape == (3, 6, 7) and batch["pixel_mask"].dtype == torch.int64
    for index, (height, width) in enumerate([(4, 7), (6, 5), (3, 3)]):
        for row in range(6):
            for column in range(7):
                inside = row < height and column < width
                pixel = examples[index]["pixel_values"][:, row, column] if inside else torch.zeros(3)
                assert batch["pixel_values"][index, :, row, column].equal(pixel)
                assert batch["pixel_mask"][index, row, column] == int(inside)
        labels, count = examples[index]["labels"], [2, 0, 1][index]
        told = batch["labels"][index]
        assert told == {"image_id": height * 10, "objects": count, "orig_size": [2 * height, 3 * width]}
        assert {type(told["image_id"]), type(told["objects"]), *map(type, told["orig_size"])} == {int}
        assert batch["targets"][index, :count, 1:].equal(labels["boxes"])
        assert batch["targets"][index, :count, 0].equal(labels["class_labels"].float())
    assert batch["targets"].shape == (3, 2, 5) and batch["targets"].dtype == torch.float32
