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


def test_images_without_labels_have_no_objects_and_are_told_from_empty_ones() -> None:
    """Whatever they bring, as an image of a labelled split does; their places are those of no object."""
    examples = [example(4, 7, 2), example(6, 5, 3) | {"labeled": False}, example(3, 3, 0)]
    batch = DetectionCollator()(examples)
    assert [label["objects"] for label in batch["labels"]] == [2, 0, 0]
    assert [label.get("labeled", True) for label in batch["labels"]] == [True, False, True]
    assert batch["targets"].shape == (3, 2, 5) and batch["targets"][1].equal(batch["targets"][2])
    assert len(examples[1]["labels"]["boxes"]) == 3


def test_a_teachers_pixels_are_padded_by_themselves() -> None:
    """Guards against one mask for two sizes: the teacher's images are of its own."""
    examples = [example(4, 7, 2), example(6, 5, 0)]
    for own, (height, width) in zip(examples, [(9, 3), (5, 8)], strict=True):
        own["teacher_pixel_values"] = torch.rand(3, height, width) + 1
    alone = DetectionCollator()([example(4, 7, 2), example(6, 5, 0)])
    batch = DetectionCollator()(examples)
    assert batch.keys() - alone.keys() == {"teacher_pixel_values", "teacher_pixel_mask"}
    assert batch["pixel_values"].equal(alone["pixel_values"]) and batch["pixel_mask"].equal(alone["pixel_mask"])
    assert batch["teacher_pixel_values"].shape == (2, 3, 9, 8)
    for index, own in enumerate(examples):
        pixels = own["teacher_pixel_values"]
        mask = torch.zeros(9, 8, dtype=torch.int64)
        mask[: pixels.shape[1], : pixels.shape[2]] = 1
        assert batch["teacher_pixel_mask"][index].equal(mask)
        assert (batch["teacher_pixel_values"][index] * (1 - mask) == 0).all()
        assert batch["teacher_pixel_values"][index][:, mask.bool()].equal(pixels.flatten(1))


def test_a_batch_of_one_size_is_resized_as_one() -> None:
    """Guards RT-DETR's random size: one for all images, every one drawn, boxes and the teacher's pixels untouched."""
    examples = [example(8, 8, 2), example(8, 8, 1)]
    teacher = torch.rand(3, 5, 5)
    for own in examples:
        own |= {"batch_sizes": [(6, 6), (8, 8), (12, 12)], "teacher_pixel_values": teacher}
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        batch = DetectionCollator()(examples)
        side = batch["pixel_values"].shape[-1]
        seen.add(side)
        assert batch["pixel_values"].shape == (2, 3, side, side) and batch["pixel_mask"].shape == (2, side, side)
        assert batch["pixel_mask"].all() and batch["teacher_pixel_values"][1].equal(teacher)
        assert batch["targets"][0, :, 1:].equal(examples[0]["labels"]["boxes"])
        assert batch["labels"][0]["orig_size"] == [16, 24]
        if side == 12:  # by hand, between four pixels
            pixels, middle = examples[0]["pixel_values"], batch["pixel_values"][0, :, 1, 1]
            place = (1 + 0.5) * 8 / 12 - 0.5  # halfway from the first to the second
            weights = torch.tensor([1 - place, place])
            torch.testing.assert_close(middle, torch.einsum("cyx,y,x->c", pixels[:, :2, :2], weights, weights))
        if side == 8:
            assert batch["pixel_values"][1].equal(examples[1]["pixel_values"])
    assert seen == {6, 8, 12}
