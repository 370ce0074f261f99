"""The ground truth of a batch as one tensor, and back."""

import torch

from d3etr_hf.outputs import Targets
from d3etr_hf.outputs.targets import pack
from tests.tiny import random_labels, targets_of


def test_packing_and_unpacking_lose_nothing():
    labels = random_labels([2, 0, 3, 1], classes=5)
    packed = pack(labels)
    assert packed.dtype == torch.float32 and packed.shape == (4, 3, 5)
    targets = Targets.from_packed(packed, [2, 0, 3, 1])
    assert targets.counts == [2, 0, 3, 1] and targets.class_labels.dtype == torch.int64
    for image, label in enumerate(labels):
        count = len(label["class_labels"])
        assert torch.equal(targets.class_labels[image, :count], label["class_labels"])
        assert torch.equal(targets.boxes[image, :count], label["boxes"])


def test_packing_pads_with_harmless_boxes():
    targets = targets_of(random_labels([2, 0, 1]))
    assert targets.boxes.shape == (3, 2, 4)
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert torch.equal(targets.boxes[1], whole.expand(2, 4)) and torch.equal(targets.boxes[2, 1], whole)
    assert (targets.class_labels[1] == 0).all() and targets.class_labels[2, 1] == 0


def test_a_batch_without_any_object():
    packed = pack(random_labels([0, 0]))
    assert packed.shape == (2, 0, 5)
    assert Targets.from_packed(packed, [0, 0]).boxes.shape == (2, 0, 4)


def test_large_labels_survive_float32():
    """Class numbers beyond what half precision holds exactly; float32 holds every one below 2 ** 24."""
    label = {"class_labels": torch.tensor([2**24 - 1, 4097]), "boxes": torch.rand(2, 4)}
    assert targets_of([label]).class_labels.tolist() == [[2**24 - 1, 4097]]


def test_objects_are_repeated_image_by_image():
    """What is padded stays behind what is there."""
    labels = random_labels([2, 0, 1])
    targets = targets_of(labels)
    repeated = targets.repeated(3)
    assert repeated.counts == [6, 0, 3]
    for image, label in enumerate(labels):
        kept = slice(0, repeated.counts[image])
        for found, once in ((repeated.class_labels, label["class_labels"]), (repeated.boxes, label["boxes"])):
            assert found[image, kept].tolist() == [each for each in once.tolist() for _ in range(3)]


def test_places_without_an_object():
    """Nobody may see nothing at all: in an image without an object all places are seen."""
    targets = targets_of(random_labels([2, 0, 1]))
    assert targets.present.tolist() == [[True, True], [False, False], [True, False]]
    assert targets.visible.shape == (3, 1, 1, 2)
    assert targets.visible[:, 0, 0].tolist() == [[True, True], [True, True], [True, False]]
    assert targets.with_a_place() is targets
    none = targets_of(random_labels([0, 0]))
    assert none.present.shape == (2, 0)
    assert none.with_a_place().boxes.tolist() == [[[0.5, 0.5, 1, 1]]] * 2
    assert none.with_a_place().present.tolist() == [[False]] * 2 and none.with_a_place().visible.all()


def test_which_images_have_labels_is_kept():
    """None stands for all; those of some images are chosen by image and not by place."""
    labels = random_labels([2, 0, 1])
    packed = pack(labels)
    assert Targets.from_packed(packed, [2, 0, 1], [True] * 3).labeled is None
    mixed = Targets.from_packed(packed, [2, 0, 1], [True, False, True])
    assert mixed.labeled == mixed.repeated(2).labeled == [True, False, True]
    empty = Targets.from_packed(pack(random_labels([0, 0])), [0, 0], [True, False])
    assert empty.with_a_place().labeled == [True, False]
    chosen = mixed.of_images([2, 0])
    assert chosen.counts == [1, 2] and chosen.labeled is None
    assert torch.equal(chosen.boxes[0, :1], labels[2]["boxes"])
    assert torch.equal(chosen.class_labels[1], labels[0]["class_labels"])
