"""What is kept of a teacher is what it would say of an image alone, to the last bit; nothing else is taken for it."""

import copy
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3etr_hf.data import Augmentation, DetectionCollator
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.data.strong_augmentation import Mosaic
from d3etr_hf.errors import DamagedFileError, UnsupportedOptionError, WriteError
from d3etr_hf.outputs import GroupRequest
from d3etr_hf.training import teacher_cache
from d3etr_hf.training.teacher import Teacher, teacher_pixels
from d3etr_hf.training.teacher_cache import TeacherCache, _digest_of_teacher, _images_of
from tests.shapes_fixture import SIDE, crop_every_other, load_shapes, shapes_trainer, weights_of
from tests.tiny import tiny_model

CLASSES = ["circle", "rectangle", "triangle"]
MAPS = GroupRequest({}, self_attention=True, cross_attention=True)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 6, 3, image_size=SIDE, progress=False)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Every second image is smaller, by another number of cells of the memory."""
    folder = make_shapes(tmp_path_factory.mktemp("uneven"), 6, 3, image_size=SIDE, progress=False)
    crop_every_other(folder, "train", 56, 40)
    return folder


def teacher_of(family="conditional_detr", seed=1) -> Teacher:
    return Teacher(tiny_model(seed=seed, model_type=family), CLASSES, 3)


def pixels_of(folder, indices, family="conditional_detr"):
    data = load_shapes(folder, "train", family=family)
    return teacher_pixels(DetectionCollator()([data[index] for index in indices]))


def cache_of(folder, data_folder, teacher=None, family="conditional_detr", precision="no") -> TeacherCache:
    teacher = teacher_of(family) if teacher is None else teacher
    cache = TeacherCache(teacher, folder, MAPS, torch.no_grad, precision)
    cache.prepare(load_shapes(data_folder, "train", family=family))
    return cache


def files_in(folder):
    return sorted(folder.rglob("*.safetensors"))


def counted(module) -> list:
    """One entry for each forward pass."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def assert_same(found, expected) -> None:
    """Bit by bit, of every field of outputs within each other."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif hasattr(expected, "__dataclass_fields__"):
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    else:
        assert found == expected


@pytest.mark.parametrize("family", ["conditional_detr", "rt_detr", "d_fine", "deformable_detr"])
def test_an_image_from_a_file_is_the_image_alone(shapes, tmp_path, family):
    """Dense and sampled attention, queries that depend on the image, box distributions."""
    for call in range(2):
        cache = cache_of(tmp_path, shapes, family=family)
        calls = counted(cache.teacher.detector)
        for index in (0, 3):
            pixels = pixels_of(shapes, [index], family)
            found = cache(pixels)
            assert len(calls) == (1 - call) * (1 + (index > 0)) and len(files_in(tmp_path)) >= 1
            assert_same(found, teacher_of(family)(pixels, MAPS, torch.no_grad))
    assert len(files_in(tmp_path)) == 2 and not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize("family", ["conditional_detr", "rt_detr", "d_fine"])
def test_a_batch_is_its_images(shapes, tmp_path, family):
    cache, teacher = cache_of(tmp_path, shapes, family=family), teacher_of(family)
    together = pixels_of(shapes, [0, 1, 2], family)
    cache(pixels_of(shapes, [1], family))
    found, expected = cache(together), teacher(together, MAPS, torch.no_grad)
    torch.testing.assert_close(found.group.probabilities, expected.group.probabilities, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.last.boxes, expected.last.boxes, atol=1e-5, rtol=1e-4)
    for maps in ("self_attention", "cross_attention"):
        for one, other in zip(getattr(found.group, maps), getattr(expected.group, maps), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not found.own_grid and torch.equal(found.memory_mask, expected.memory_mask)
    for index in range(3):
        alone = teacher(pixels_of(shapes, [index], family), MAPS, torch.no_grad)
        assert torch.equal(found.group.boxes[:, index], alone.group.boxes[:, 0])


def test_images_of_several_sizes_stand_on_one_grid(uneven, tmp_path):
    cache, teacher = cache_of(tmp_path, uneven), teacher_of()
    found = cache(pixels_of(uneven, [0, 1]))
    assert found.own_grid
    for index in range(2):
        alone = teacher(pixels_of(uneven, [index]), MAPS, torch.no_grad)
        height, width = alone.memory_mask.shape[1:]
        assert torch.equal(found.memory_mask[index, :height, :width], alone.memory_mask[0])
        assert found.memory_mask[index].sum() == height * width
        for one, other in zip(found.group.cross_attention, alone.group.cross_attention, strict=True):
            for form, expected in zip(one, other, strict=True):
                grid = form[index].unflatten(-1, found.memory_mask.shape[1:])[..., :height, :width]
                assert torch.equal(grid.flatten(-2), expected[0])
            torch.testing.assert_close(one.probability[index].sum(-1), torch.ones(4, 7))
            assert one.log.isfinite().all()


def trained(data, output, cache=None, batch=1, **options):
    trainer = shapes_trainer(
        data, output, max_steps=8, per_device_train_batch_size=batch, teacher_cache=cache and str(cache), **options
    )
    calls = counted(trainer.teacher.detector)
    trainer.train()
    return weights_of(trainer.model), len(calls)


def test_training_with_files_is_training_without(shapes, tmp_path):
    """Of one image a batch to the last bit; the teacher is asked for each image once, and then no more."""
    plain, calls = trained(shapes, tmp_path / "plain")
    first, asked = trained(shapes, tmp_path / "first", tmp_path / "cache")
    again, asked_again = trained(shapes, tmp_path / "again", tmp_path / "cache")
    assert torch.equal(first, plain) and torch.equal(again, plain)
    assert (calls, asked, asked_again) == (8, 6, 0) and len(files_in(tmp_path / "cache")) == 6


def test_a_cache_that_is_half_there_is_gone_on_with(uneven, tmp_path):
    """In batches of several sizes, too: where outputs come from makes no difference."""
    whole, asked = trained(uneven, tmp_path / "whole", tmp_path / "cache", batch=3)
    for file in files_in(tmp_path / "cache")[::2]:
        file.unlink()
    half, asked_again = trained(uneven, tmp_path / "half", tmp_path / "cache", batch=3)
    assert torch.equal(whole, half) and (asked, asked_again) == (6, 3)


def test_another_teacher_image_or_precision_is_another_entry(shapes, tmp_path):
    pixels = pixels_of(shapes, [0])
    cache_of(tmp_path, shapes)(pixels)
    slightly = teacher_of()
    with torch.no_grad():
        next(slightly.detector.parameters()).view(-1)[0] += 1e-3
    pixel = {name: value.clone() for name, value in pixels.items()}
    pixel["pixel_values"][0, 0, 0, 0] += 1e-3
    fewer = Teacher(tiny_model(seed=1), CLASSES, 2)
    for number, (cache, seen) in enumerate(
        [
            (cache_of(tmp_path, shapes, slightly), pixels),
            (cache_of(tmp_path, shapes), pixel),
            (cache_of(tmp_path, shapes, precision="bf16"), pixels),
            (cache_of(tmp_path, shapes, fewer), pixels),
        ]
    ):
        cache(seen)
        assert len(files_in(tmp_path)) == number + 2


def test_images_that_change_are_refused(shapes, tmp_path):
    data = load_shapes(shapes, "train")
    data.transform.augmentation = Augmentation([SIDE], SIDE)
    with pytest.raises(UnsupportedOptionError, match="teacher_cache: .*set augmentation to none"):
        shapes_trainer(shapes, tmp_path, train=data, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(UnsupportedOptionError, match="teacher_cache: these options never run a teacher"):
        shapes_trainer(shapes, tmp_path, teacher=None, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(UnsupportedOptionError, match="keeps no encoder memory: leave it out, or set fgd_weight to 0"):
        shapes_trainer(shapes, tmp_path, teacher_cache=str(tmp_path / "cache"), fgd_weight=1.0)


def test_a_disk_without_room_is_told_first_and_a_full_one_once(shapes, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(WriteError, match=r"outputs of 6 images take about .* GiB more .* 0.0 GiB are free"):
        cache_of(tmp_path / "cache", shapes)
    monkeypatch.undo()
    cache = cache_of(tmp_path / "cache", shapes)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d3etr_hf.training.teacher_cache.save_file", full)
    with pytest.raises(WriteError, match="safetensors cannot be written .No space left on device"):
        cache(pixels_of(shapes, [0]))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file.* cannot be written"):
        cache_of(tmp_path / "file", shapes)


def test_a_damaged_file_is_named(shapes, tmp_path):
    cache, pixels = cache_of(tmp_path, shapes), pixels_of(shapes, [0])
    cache(pixels)
    (file,) = files_in(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DamagedFileError, match=f"{file.name} cannot be read .*: remove it"):
        cache(pixels)


def test_all_that_is_taken_of_a_teacher_and_the_shape_of_an_image_are_in_their_names():
    """Files of one folder are taken for whatever asks for their names."""
    teacher = teacher_of()
    folders = [_digest_of_teacher(teacher, MAPS, "no")]
    folders.append(_digest_of_teacher(teacher, MAPS._replace(self_attention=not MAPS.self_attention), "no"))
    folders.append(_digest_of_teacher(teacher, MAPS._replace(cross_attention=not MAPS.cross_attention), "no"))
    for name, value in (("class_index", teacher.class_index.flip(0)), ("layer_map", teacher.layer_map[::-1])):
        changed = copy.copy(teacher)
        setattr(changed, name, value)
        folders.append(_digest_of_teacher(changed, MAPS, "no"))
    assert len(set(folders)) == 5
    names = set()
    for height, width in ((2, 8), (4, 4), (8, 2)):
        pixels = {"pixel_values": torch.zeros(1, 3, 9, 9), "pixel_mask": torch.zeros(1, 9, 9)}
        pixels["pixel_mask"][:, :height, :width] = 1
        ((name, image),) = _images_of(pixels)
        assert image.shape == (3, height, width)
        names.add(name)
    assert len(names) == 3


def test_a_common_grid_is_as_high_and_as_wide_as_its_images(uneven, tmp_path):
    """Of one that is higher and one that is wider, neither of them square."""
    cache, pixels, sizes = cache_of(tmp_path, uneven), pixels_of(uneven, [0, 2]), ((SIDE, 16), (16, 48))
    pixels["pixel_mask"] = torch.zeros_like(pixels["pixel_mask"])
    for index, (height, width) in enumerate(sizes):
        pixels["pixel_mask"][index, :height, :width] = 1
    grids = [
        tuple(cache({name: value[index : index + 1] for name, value in pixels.items()}).memory_mask.shape[1:])
        for index in range(2)
    ]
    (high, _), (_, wide) = grids
    found = cache(pixels).memory_mask
    assert found.shape[1:] == (high, wide) and high > grids[1][0] and wide > grids[0][1]
    assert [(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in found] == grids


def test_a_file_of_other_outputs_is_named(shapes, tmp_path):
    cache, pixels = cache_of(tmp_path, shapes), pixels_of(shapes, [0])
    cache(pixels)
    (file,) = files_in(tmp_path)
    tensors = load_file(file)
    name, values = next(iter(tensors.items()))
    for others in ({n: v for n, v in tensors.items() if n != name}, tensors | {name: values.half()}):
        save_file(others, file)
        with pytest.raises(DamagedFileError, match=f"{file.name} holds other tensors .*'{name}': remove it"):
            cache(pixels)


def test_files_of_other_images_take_no_room_off(shapes, uneven, tmp_path, monkeypatch):
    """Guards a full disk in the middle of a training: a folder is shared by data sets."""
    cache_of(tmp_path / "cache", shapes)(pixels_of(shapes, range(6)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    cache_of(tmp_path / "cache", shapes)  # all of it is there
    with pytest.raises(WriteError, match="outputs of 6 images"):
        cache_of(tmp_path / "cache", uneven)


def test_room_for_images_without_labels_is_asked_for(shapes, tmp_path, monkeypatch):
    """All labelled images are there already."""
    cache = cache_of(tmp_path / "cache", shapes)
    cache(pixels_of(shapes, [0, 1]))
    data = load_shapes(shapes, "train")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    cache.prepare(data.select([0, 1]).with_unlabeled(data.select([1, 0]), 1))
    with pytest.raises(WriteError, match="outputs of 6 images"):
        cache.prepare(data.select([0, 1]).with_unlabeled(data.select([2, 3, 4, 5]), 1))


def test_mosaics_are_refused_of_python_too(shapes, tmp_path):
    data = load_shapes(shapes, "train")
    data.mosaic = Mosaic(0.5, 0.5)
    with pytest.raises(UnsupportedOptionError, match="teacher_cache: mosaics are other images every epoch"):
        shapes_trainer(shapes, tmp_path, train=data, teacher_cache=str(tmp_path / "cache"))


def test_another_version_of_this_package_is_another_entry(shapes, tmp_path, monkeypatch):
    first = cache_of(tmp_path, shapes).folder
    monkeypatch.setattr(teacher_cache, "version", lambda package: f"{package} 0.0.1")
    assert cache_of(tmp_path, shapes).folder != first
