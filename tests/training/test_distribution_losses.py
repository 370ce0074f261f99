"""What ground truth teaches D-FINE through the trainer: by its authors' rules, from Transformers' functions."""

from collections import Counter

import pytest
import torch
from transformers.loss.loss_d_fine import DFineLoss

from d3etr_hf.outputs import AUXILIARY, NO_OBJECT, OWN, GroupOutput, GroupRequest
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.objective import D3etrObjective, Shares
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.slow_reference import with_bins_of
from tests.tiny import padded_batch, random_labels, random_queries, targets_of, tiny_model
from tests.training.test_family_losses import OBJECTS, examples, logged

ALONE = {"auxiliary_queries": "none", "adaptive_matching": False}

WEIGHTS = {"vfl": 1.5, "mal": 1.5, "bbox": 4.0, "giou": 3.0, "fgl": 0.7, "ddf": 1.1}


def model_of(family: str = "d_fine", class_loss: str = "vfl", **options):
    names = (class_loss, "bbox", "giou", "fgl", "ddf")
    return tiny_model(model_type=family, **{f"weight_loss_{name}": WEIGHTS[name] for name in names}, **options)


def union(matchings: list) -> list:
    """Image by image the most frequent object of each query that has one."""
    found = []
    for image in range(len(matchings[0])):
        votes: dict[int, Counter] = {}
        for matching in matchings:
            for query, index in zip(*(part.tolist() for part in matching[image]), strict=True):
                votes.setdefault(query, Counter())[index] += 1
        pairs = {query: min(of, key=lambda index: (-of[index], index)) for query, of in votes.items()}
        found.append(
            (torch.tensor(list(pairs), dtype=torch.long), torch.tensor(list(pairs.values()), dtype=torch.long))
        )
    return found


class Expected:
    """Every term of one batch, from what the stock model gave in training.

    Args:
        loss: Transformers' loss module.
        class_loss: its name of the class loss.
        unions: whether losses of boxes take the union of assignments.
    """

    def __init__(self, loss, class_loss: str, output, labels, unions: bool = True):
        self.loss, self.class_loss, self.labels, self.unions = loss, class_loss, labels, unions
        self.terms: dict[str, float] = {}
        self.objects = max(1, sum(len(label["boxes"]) for label in labels))
        meta = output.denoising_meta_values
        dn, queries = (0, 7) if meta is None else meta["dn_num_split"]

        def parts(values):
            return values.transpose(0, 1).split([dn, queries], dim=2)

        of_output = zip(
            parts(output.intermediate_logits),
            parts(output.intermediate_reference_points),
            parts(output.intermediate_predicted_corners),
            parts(output.initial_reference_points),
            strict=True,
        )
        denoising, own = of_output
        self.own(own, output)
        if meta is not None:
            pairs = self.loss.get_cdn_matched_indices(meta, labels)
            objects = self.objects * meta["dn_num_group"]
            self.group("denoising", denoising, [pairs] * 4, [pairs] * 4, objects, objects)

    def own(self, part, output):
        logits, boxes, *_ = part
        matched = [self.match(*layer) for layer in zip(logits, boxes, strict=True)]
        proposed = self.match(output.enc_topk_logits, output.enc_topk_bboxes)
        every = [*matched, proposed]
        boxed, count = every, self.objects
        if self.unions:
            boxed = [union(every)] * len(every)
            count = max(1, sum(len(queries) for queries, _ in boxed[0]))
        self.group("student", part, matched, boxed, self.objects, count)
        given = {"logits": output.enc_topk_logits, "pred_boxes": output.enc_topk_bboxes}
        self.add("proposals", 0, given, (proposed, boxed[-1]), (self.objects, count))

    def match(self, logits, boxes):
        return self.loss.matcher({"logits": logits, "pred_boxes": boxes.clamp(0, 1)}, self.labels)

    def group(self, name, part, pairs, boxed, objects, count):
        logits, boxes, corners, references = part
        first = "first_head" if name == "student" else f"{name}_first_head"
        self.add(first, 0, {"logits": logits[0], "pred_boxes": boxes[0]}, (pairs[0], boxed[0]), (objects, count))
        for layer in range(3):
            given = {
                "logits": logits[layer + 1],
                "pred_boxes": boxes[layer + 1],
                "pred_corners": corners[layer],
                "ref_points": references[layer],
                "teacher_corners": corners[-1],
                "teacher_logits": logits[-1],
            }
            self.add(name, layer, given, (pairs[layer + 1], boxed[layer + 1]), (objects, count))

    def add(self, name, layer, given, pairs, counts):
        given = given | {"pred_boxes": given["pred_boxes"].clamp(0, 1)}
        values = self.loss.get_loss(self.class_loss, given, self.labels, pairs[0], counts[0])
        values |= self.loss.loss_boxes(given, self.labels, pairs[1], counts[1])
        values |= self.loss.loss_local(given, self.labels, pairs[1], counts[1])
        names = {"class": self.class_loss, "l1": "bbox", "giou": "giou", "fgl": "fgl", "ddf": "ddf"}
        for term, stock in names.items():
            if f"loss_{stock}" in values:
                value = WEIGHTS[stock] * float(values[f"loss_{stock}"].detach())
                self.terms[f"{name}/{term}/layer_{layer}"] = value


def check_every_term(model, loss, class_loss: str, objects: list[int], folder, unions: bool = True) -> None:
    """Of a batch with so many objects in its images, what the trainer logs is what is expected."""
    images = examples(objects)
    labels = [image["labels"] for image in images]
    torch.manual_seed(7)
    stock = model.to_stock().train()
    output = stock(torch.stack([image["pixel_values"] for image in images]), labels=labels)
    expected = Expected(loss, class_loss, output, labels, unions).terms
    found = logged(model, images, folder)
    names = {name.removeprefix("loss/") for name in found if "/layer_" in name}
    assert names == set(expected)
    assert {name.split("/")[0] for name in names} >= {"student", "first_head", "proposals"}
    for name, value in expected.items():
        assert found[f"loss/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert found["loss"] == pytest.approx(sum(expected.values()), rel=1e-4)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("objects", [OBJECTS, [0, 0]], ids=["objects", "no object"])
def test_every_term_is_what_the_authors_train_with(objects, tmp_path):
    """Among them the union of assignments for boxes, and distributions that go with their own layer."""
    model = model_of()
    check_every_term(model, with_bins_of(DFineLoss(model.config), model), "vfl", objects, tmp_path)


def test_the_union_matters_here(tmp_path):
    """Else the test above would hold without it."""
    model, images = model_of(), examples(OBJECTS)
    torch.manual_seed(7)
    labels = [image["labels"] for image in images]
    output = model.to_stock().train()(torch.stack([image["pixel_values"] for image in images]), labels=labels)
    own = [
        part.transpose(0, 1)[:, :, -7:] for part in (output.intermediate_logits, output.intermediate_reference_points)
    ]
    loss = with_bins_of(DFineLoss(model.config), model)
    matched = [
        loss.matcher({"logits": logits, "pred_boxes": boxes.clamp(0, 1)}, labels)
        for logits, boxes in zip(*own, strict=True)
    ]
    assert sum(len(queries) for queries, _ in union(matched)) > 5


def near_objects(model):
    """Its output of three images, and five objects near boxes of it, so that no loss is zero."""
    images = examples(OBJECTS)
    output = model(torch.stack([image["pixel_values"] for image in images]), request=GroupRequest())
    labels = [image["labels"] for image in images]
    for label, boxes in zip(labels, output.groups[OWN].boxes[-1].detach().clamp(0.1, 0.9), strict=True):
        label["boxes"] = 0.9 * boxes[: len(label["boxes"])]
    return output, targets_of(labels)


def test_pairs_are_counted_over_processes(tmp_path):
    """Seen by one of two whose other one found ten pairs, for as many objects."""
    model = model_of()
    (output, targets), criterion = near_objects(model), model.criterion()
    options = D3etrTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **ALONE).distillation
    found = []
    for average in (lambda tensor: tensor, lambda tensor: (tensor + torch.tensor([10.0, 5.0])) / 2):
        shares = Shares(torch.tensor(4.0), torch.tensor(5.0), {OWN: torch.tensor(5.0)}, average)
        found.append(D3etrObjective(options, criterion)(output, None, targets, shares)[0])
    own = criterion.box_assignments({OWN: criterion.assign(output.groups[OWN], targets)})[OWN]
    pairs = int((own != NO_OBJECT).sum())
    for term in ("l1", "giou", "fgl"):
        alone, both = (terms[f"student/{term}"] for terms in found)
        torch.testing.assert_close(alone * pairs, both * (pairs + 10) / 2)
        assert alone.min() > 0
    assert found[0]["student/l1"][0] > 1.1 * found[1]["student/l1"][0]
    for term in ("class", "ddf"):
        assert torch.equal(found[0][f"student/{term}"], found[1][f"student/{term}"])


def test_pairs_are_scaled_to_the_objects_of_the_step(tmp_path):
    """Of a step of twice as many objects a batch counts half as much, whatever the number of images."""
    model, images = model_of(), torch.tensor(7.0)
    output, targets = near_objects(model)
    run = D3etrObjective(Distillation(**ALONE), model.criterion())
    once, twice = (
        run(output, None, targets, Shares(images, count, {OWN: count}, average=lambda tensor: tensor))[0]
        for count in torch.tensor([5.0, 10.0])
    )
    own = run.criterion.box_assignments({OWN: run.criterion.assign(output.groups[OWN], targets)})[OWN]
    sums = run.criterion.losses(output.groups[OWN], targets, own.expand(3, -1, -1))
    for term in ("l1", "giou", "fgl"):
        expected = WEIGHTS[{"l1": "bbox"}.get(term, term)] * sums[term] / (own != NO_OBJECT).sum()
        torch.testing.assert_close(once[f"student/{term}"], expected)
        torch.testing.assert_close(2 * twice[f"student/{term}"], expected)


def test_the_teachers_assignment_counts_for_boxes_and_takes_no_union(tmp_path):
    """Of the auxiliary group: layer by layer its own, in the last the teacher's, by a loop."""
    student, labels = tiny_model(2, "d_fine").train(), random_labels([3, 2], seed=3)
    targets = targets_of(labels)
    request = GroupRequest({AUXILIARY: random_queries(5, anchor_size=4)}, targets=targets)
    output = student(padded_batch()["pixel_values"], request=request)
    given = torch.tensor([[[2, -1, 0, 1, -1], [-1, 1, -1, -1, 0]]])
    options = Distillation(adaptive_matching=False, fixed_matching=False)
    criterion, one = student.criterion(), torch.tensor(1.0)
    shares = Shares(2 * one, 5 * one, {OWN: 5 * one, AUXILIARY: 5 * one}, average=lambda tensor: tensor)
    terms, _ = D3etrObjective(options, criterion)(output, None, targets, shares, lambda: given)
    group = output.groups[AUXILIARY]
    earlier = criterion.assign(GroupOutput(logits=group.logits[:-1], boxes=group.boxes[:-1]), targets)
    for layer, assignment in enumerate([*earlier, given[0]]):
        total = 0.0
        for image, label in enumerate(labels):
            for query, index in enumerate(assignment[image].tolist()):
                if index != NO_OBJECT:
                    difference = group.boxes[layer, image, query].clamp(0, 1) - label["boxes"][index]
                    total += float(difference.detach().abs().sum())
        assert float(terms["auxiliary/l1"][layer]) == pytest.approx(5 * total / 5, rel=1e-4)
