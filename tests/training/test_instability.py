"""How much a matching changes between visits, against a loop over queries; what the trainer logs of it."""

import pytest
import torch
from transformers import TrainerCallback

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.matching import MatchedPairs
from d3etr_hf.training import instability
from d3etr_hf.training.instability import Instability, Visit, logged_instability, partners_of, shares_of
from tests.shapes_fixture import SIDE, shapes_trainer
from tests.tiny import perturb

LAYERS, IMAGES, QUERIES, EPOCHS = 2, 6, 5, 4


def visits_of_a_training() -> dict[tuple[int, int], tuple[int, dict[str, torch.Tensor]]]:
    """By epoch and image the number of objects and partners by kind, (L, N) each; some images lose an object."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for epoch in range(EPOCHS):
        for image in range(IMAGES):
            objects = 3 if (epoch + image) % 4 else 2
            partners = {
                "adaptive": torch.randint(-1, 4, (LAYERS, QUERIES), generator=generator),
                "own": torch.randint(-1, objects, (LAYERS, QUERIES), generator=generator),
            }
            found[epoch, image] = objects, partners
    return found


def slow_shares(training, compared) -> dict[str, float]:
    """DN-DETR's measure as a share, over those (epoch, image) that `compared` says follow on the one before."""
    shares = {}
    for kind in ("adaptive", "own"):
        for k in range(LAYERS):
            changed = held = 0
            for (epoch, image), (objects, partners) in training.items():
                if epoch == 0 or not compared(epoch, image):
                    continue
                earlier, before = training[epoch - 1, image]
                if kind == "own" and objects != earlier:
                    continue
                for n in range(QUERIES):
                    now, then = int(partners[kind][k, n]), int(before[kind][k, n])
                    held += now != -1 or then != -1
                    changed += now != then
            shares[f"instability/{kind}/layer_{k}"] = changed / held
    return shares


def counted(training, processes: list[Instability], process_of) -> dict[str, float]:
    """What they find in batches of one image or more, added up."""
    sums: dict[str, float] = {}
    for epoch in range(EPOCHS):
        for number, process in enumerate(processes):
            images = [image for image in range(IMAGES) if process_of(epoch, image) == number]
            for batch in (images[:1], images[1:]):
                if batch:
                    rows = [training[epoch, image] for image in batch]
                    visits = [Visit(100 + image, row[0], epoch) for image, row in zip(batch, rows, strict=True)]
                    kinds = {kind: torch.stack([row[1][kind] for row in rows], dim=1) for kind in rows[0][1]}
                    for name, count in process.compare(visits, kinds).items():
                        sums[name] = sums.get(name, 0.0) + float(count)
    return shares_of(sums)


def test_shares_equal_a_loop():
    """Of one process, of two between which the images are shared out, and of two that exchange some of them."""
    training = visits_of_a_training()
    expected = slow_shares(training, lambda epoch, image: True)
    assert counted(training, [Instability(IMAGES)], lambda epoch, image: 0) == pytest.approx(expected)
    two = [Instability(IMAGES), Instability(IMAGES)]
    assert counted(training, two, lambda epoch, image: image % 2) == pytest.approx(expected)

    def process_of(epoch, image):
        return (image + (epoch if image < 3 else 0)) % 2 if image else epoch // 2

    stayed = slow_shares(training, lambda epoch, image: process_of(epoch, image) == process_of(epoch - 1, image))
    two = [Instability(IMAGES), Instability(IMAGES)]
    found = counted(training, two, process_of)
    assert found == pytest.approx(stayed) and found != pytest.approx(expected)


def test_partners_of_the_teachers_queries():
    teacher, student = torch.tensor([[[3, 0, 2]]]), torch.tensor([[[0, 1, 4]]])
    assert partners_of(MatchedPairs(teacher, student), 5).tolist() == [[[1, -1, 4, 0, -1]]]
    confident = torch.tensor([[[True, False, True]]])
    assert partners_of(MatchedPairs(teacher, student, counted=confident), 5).tolist() == [[[-1, -1, 4, 0, -1]]]


def test_of_many_images_some_are_followed(monkeypatch):
    """The same ones by every process, so that memory has a bound."""
    monkeypatch.setattr(instability, "MOST_IMAGES", 500)
    partners = {"own": torch.zeros(1, 1, 2, dtype=torch.int64)}
    seen = []
    for _ in range(2):
        follower = Instability(5_000)
        for image in range(5_000):
            follower.compare([Visit(image, 1, 0)], partners)
        seen.append(follower._seen.keys())
    assert seen[0] == seen[1] and 400 < len(seen[0]) < 600


class Disturb(TrainerCallback):
    """Changes the student after the second epoch."""

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if round(state.epoch) == 2:
            perturb(model, 0.3)


def test_what_a_training_logs(tmp_path):
    """Nothing changes while the student stands still; when it is disturbed all but the teacher's assignment does."""
    shapes = make_shapes(tmp_path / "shapes", 8, 3, image_size=SIDE, progress=False)
    trainer = shapes_trainer(
        shapes,
        tmp_path / "run",
        callbacks=[Disturb()],
        max_steps=-1,
        num_train_epochs=4,
        logging_strategy="epoch",
        learning_rate=0.0,
        backbone_learning_rate=0.0,
        log_instability=True,
    )
    trainer.train()
    logs = [
        {name: value for name, value in entry.items() if name.startswith("instability/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    layers = {"adaptive": [0, 1, 2], "own": [0, 1, 2], "auxiliary_own": [0, 1], "teacher_given": [2]}
    names = {f"instability/{kind}/layer_{k}" for kind, indices in layers.items() for k in indices}
    assert [set(log) for log in logs] == [set(), names, names, names]
    assert set(logs[1].values()) == set(logs[3].values()) == {0.0}
    assert all((value > 0) == ("teacher_given" not in name) for name, value in logs[2].items())


def test_what_was_logged_is_found_by_kind_and_layer():
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0, "instability/own/layer_0": 0.5, "instability/own/layer_10": 0.25},
        {"step": 2, "eval_AP": 0.5},
        {"step": 4, "instability/own/layer_0": 0.1, "instability/adaptive/layer_0": 0.0},
    ]
    assert logged_instability(history) == {
        "own": {0: [(2, 0.5), (4, 0.1)], 10: [(2, 0.25)]},
        "adaptive": {0: [(4, 0.0)]},
    }
