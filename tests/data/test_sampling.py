"""What is drawn for an image in training, and which images are handed out."""

import random

import pytest
import torch

from d3etr_hf.data import DetectionCollator
from d3etr_hf.data.sampling import TrainingSample, TrainingSampler
from d3etr_hf.data.shapes import make_shapes
from tests.shapes_fixture import SIDE, load_shapes


@pytest.fixture(scope="module")
def augmented(tmp_path_factory):
    folder = make_shapes(tmp_path_factory.mktemp("shapes"), 8, 1, image_size=SIDE, progress=False)
    return load_shapes(folder, "train", augmented=True)


def pixels_of(dataset, epoch, index) -> torch.Tensor:
    return dataset[TrainingSample(index, seed=42, epoch=epoch, step=0)]["pixel_values"]


def test_augmentation_belongs_to_the_image_and_the_epoch(augmented):
    """Not to what was drawn before, nor to the row; and it draws nothing from what dropout is drawn from."""
    forward = [[pixels_of(augmented, epoch, index) for index in range(8)] for epoch in range(3)]
    torch.manual_seed(random.randrange(1000))
    state = torch.get_rng_state()
    for epoch in (2, 0, 1):
        for index in (5, 1, 7, 0, 3, 2, 6, 4):
            assert pixels_of(augmented, epoch, index).equal(forward[epoch][index])
    assert torch.get_rng_state().equal(state)
    assert pixels_of(augmented.select([6, 2]), 1, 1).equal(forward[1][2])
    differs = [not forward[0][index].equal(forward[epoch][index]) for index in range(8) for epoch in (1, 2)]
    assert 3 < sum(differs) < 13  # a flip of every second


def test_every_image_comes_once_an_epoch_in_a_new_order():
    sampler = TrainingSampler(range(11), 7, True, batch_size=2, accumulated=2)
    orders = []
    for epoch in (0, 1, 1):
        sampler.set_epoch(epoch)
        samples = list(sampler)
        assert {sample.epoch for sample in samples} == {epoch} and len(samples) == len(sampler) == 11
        assert [sample.step for sample in samples] == [0] * 4 + [1] * 4 + [2] * 3
        orders.append([sample.index for sample in samples])
    assert orders[1] == orders[2] != orders[0] and sorted(orders[0]) == sorted(orders[1]) == list(range(11))


def beside(dataset, labeled, unlabeled, ratio):
    """So many of its images, and these rows of it without labels."""
    return dataset.select(range(labeled)).with_unlabeled(dataset.select(unlabeled), ratio)


def test_images_without_labels_come_at_even_distances_and_each_once_before_any_twice(augmented):
    """Three of them for every two others: a batch of five has three, whatever epoch and process it is of."""
    sampler = TrainingSampler(beside(augmented, 4, range(8), 1.5), 7, True, batch_size=5)
    turns, epochs = [], []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        indices = [sample.index for sample in sampler]
        assert len(indices) == len(sampler) == 10
        assert sorted(index for index in indices if index < 4) == list(range(4))
        assert [sum(index >= 4 for index in indices[start : start + 5]) for start in (0, 5)] == [3, 3]
        turns += [index for index in indices if index >= 4]
        epochs.append(indices)
    passes = [turns[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(each) == list(range(4, 12)) for each in passes) and passes[0] != passes[1] != passes[2]
    sampler.set_epoch(2)  # as a run that goes on
    assert [sample.index for sample in sampler] == epochs[2]
    other_seed = TrainingSampler(beside(augmented, 4, range(8), 2), 8, True, batch_size=5)
    assert [sample.index for sample in other_seed if sample.index >= 4] != passes[0]
    in_order = TrainingSampler(beside(augmented, 2, range(3), 1), 7, False, batch_size=2)
    orders = []
    for epoch in range(2):
        in_order.set_epoch(epoch)
        orders.append([sample.index for sample in in_order])
    assert orders == [[0, 2, 1, 3], [0, 4, 1, 2]]


def test_an_image_without_labels_is_another_each_time_it_comes_in_an_epoch(augmented):
    """With more places than images; a labelled image draws what it draws without the others."""
    both = beside(augmented, 1, [1, 2], 30)
    sampler = TrainingSampler(both, 42, True, 4)
    samples = [sample for sample in sampler if sample.index == 1]
    assert [sample.visit for sample in samples] == list(range(15))
    pixels = [both[sample]["pixel_values"] for sample in samples]
    assert 3 < sum(each.equal(pixels[0]) for each in pixels) < 13
    assert not both[samples[0]]["labeled"] and "labeled" not in both[TrainingSample(0, 42, 3, 0)]
    assert both[TrainingSample(0, 42, 3, 0)]["pixel_values"].equal(pixels_of(augmented, 3, 0))


def test_the_size_of_squares_is_one_for_a_step_on_all_processes(augmented):
    """RT-DETR's random side: each process collates its own images, perhaps in several batches."""

    def sides(indices, step):
        examples = [augmented[TrainingSample(index, 42, 0, step)] for index in indices]
        batch = DetectionCollator()(
            [example | {"batch_sizes": [(32, 32), (48, 48), (64, 64)]} for example in examples]
        )
        return batch["pixel_values"].shape[-1]

    drawn = [{sides([0, 1], step), sides([2], step), sides([3, 4, 5], step)} for step in range(20)]
    assert all(len(of_step) == 1 for of_step in drawn)
    assert set.union(*drawn) == {32, 48, 64}


def test_images_that_fill_up_the_last_batch_are_left_out(augmented):
    """Five images in batches of two on two processes: the fourth batch has one of its own, the other process none."""
    samples = list(TrainingSampler(range(5), 7, True, batch_size=4, fill_up=True))
    assert len(samples) == 8 and [sample.repeated for sample in samples] == [False] * 5 + [True] * 3
    assert [sample.index for sample in samples[5:]] == [sample.index for sample in samples[:3]]
    examples = [augmented[sample] for sample in samples]
    batches = [DetectionCollator()(examples[start : start + 2]) for start in range(0, 8, 2)]
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1, 0]
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 2, 1, 1]
    assert batches[3]["pixel_values"].equal(examples[6]["pixel_values"][None])
    assert batches[3]["targets"].shape == (1, 0, 5) and batches[0]["targets"].shape[1] > 0
    tiny = TrainingSampler(range(2), 7, True, batch_size=8, fill_up=True)
    assert len(list(tiny)) == 8
