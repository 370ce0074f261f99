"""The trainer: what reaches the loss, the log, the optimizer, the metric and the disk."""

import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import ConditionalDetrForObjectDetection, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from d3etr_hf.data import DetectionCollator
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import IncompatibleDataError, IncompatibleTeacherError, NonFiniteLossError
from d3etr_hf.evaluation import average_precision_of, predict_detections
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import load_detector
from d3etr_hf.outputs import AUXILIARY
from tests.shapes_fixture import SIDE, crop_every_other, load_shapes, shapes_trainer, weights_of
from tests.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 24, 11, image_size=SIDE, progress=False)


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory):
    """Every second image is smaller, so that every batch is padded."""
    folder = make_shapes(tmp_path_factory.mktemp("two_sizes"), 8, 11, image_size=SIDE, progress=False)
    for split in ("train", "val"):
        crop_every_other(folder, split, 56, 40)
    return folder


def batch_of(trainer, count=4):
    return DetectionCollator()([trainer.train_dataset[index] for index in range(count)])


def training_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_logged_terms_add_up_to_the_loss(shapes, tmp_path):
    """HF_NOTES 16: over two accumulated batches and two steps a log, every term is an exact mean."""
    trainer = shapes_trainer(shapes, tmp_path, max_steps=4, gradient_accumulation_steps=2, logging_steps=2)
    trainer.train()
    assert len(training_logs(trainer)) == 2
    for entry in training_logs(trainer):
        terms = {name: value for name, value in entry.items() if name.startswith("loss/")}
        assert len(terms) == 12
        assert sum(terms.values()) == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["matched_foreground"] == pytest.approx(1.0)


def test_logged_terms_equal_the_first_step_computed_by_hand(shapes, tmp_path):
    trainer = shapes_trainer(shapes, tmp_path, max_steps=1, log_each_layer=True, log_gradient_norms=True)
    seen = []
    original = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **options: (seen.append(inputs), original(model, inputs, **options))[
        1
    ]
    trainer.train()
    entry = training_logs(trainer)[0]
    fresh = shapes_trainer(shapes, tmp_path / "fresh")
    loss = fresh.compute_loss(fresh.model, seen[0])
    assert float(loss.detach()) == pytest.approx(entry["loss"], rel=1e-5)
    per_layer = [entry[f"loss/student/prediction/layer_{k}"] for k in range(3)]
    assert sum(per_layer) == pytest.approx(entry["loss/student/prediction"], rel=1e-5)
    loss.backward()
    total = torch.cat([p.grad.flatten() for p in fresh.model.parameters() if p.grad is not None]).norm()
    norms = {name: value for name, value in entry.items() if name.startswith("gradient_norm/")}
    assert len(norms) == 12 and all(value > 0 for value in norms.values())
    assert float(total) <= sum(norms.values()) * (1 + 1e-5)  # triangle inequality
    assert max(norms.values()) - sum(sorted(norms.values())[:-1]) <= float(total) * (1 + 1e-5)


def test_accumulated_batches_equal_one_batch(shapes, tmp_path):
    """HF_NOTES 14: 2 x 2 accumulated images give the step of 4 images."""
    moved = []
    for size, accumulated in ((4, 1), (2, 2)):
        trainer = shapes_trainer(
            shapes,
            tmp_path / str(size),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer.train()
        moved.append((weights_of(trainer.model), training_logs(trainer)[0]))
    (whole, whole_log), (parts, parts_log) = moved
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for name, value in whole_log.items():
        if name.startswith("loss"):
            assert parts_log[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
    ("queries", "groups", "held"),
    [("teacher", 1, [10, 8]), ("learned", 1, [10, 10]), ("learned", 2, [10, 10, 10]), ("none", 1, [10])],
)
def test_objects_beyond_a_groups_queries_are_not_counted_as_held(shapes, tmp_path, queries, groups, held):
    """The class loss of DETR is divided by what finds a query: of nine objects seven, or a smaller teacher's five."""
    trainer = shapes_trainer(
        shapes,
        tmp_path,
        student=tiny_model(num_queries=7),
        teacher=tiny_model(num_queries=5),
        auxiliary_queries=queries,
        auxiliary_groups=groups,
    )
    unlabeled = {"objects": 0, "labeled": False}
    batches = [{"labels": [{"objects": 9}, {"objects": 0}, unlabeled]}, {"labels": [{"objects": 3}, unlabeled]}]
    counts = trainer._get_num_items_in_batch(batches, trainer.args.device)
    assert counts.tolist() == [5, 12, 3, *held]
    shares = trainer._shares(counts)
    assert (shares.images, shares.objects, shares.of_detection) == (5, 12, 3)
    assert list(shares.held.values()) == held


def test_teacher_is_frozen_and_kept_out_of_the_student(shapes, tmp_path):
    """HF_NOTES 7: a teacher held as a submodule is saved along and flipped by `.train()`."""
    trainer = shapes_trainer(shapes, tmp_path, teacher=tiny_model(seed=1).train())  # as a training leaves it
    teacher, before = trainer.teacher.detector, weights_of(trainer.teacher.detector)
    assert not any(name.startswith("query_adapters") for name, _ in trainer.model.named_parameters())
    queries = trainer.teacher.queries().position.clone()
    trainer.train()
    assert not teacher.training and trainer.model.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert torch.equal(weights_of(teacher), before)
    assert torch.equal(trainer.teacher.queries().position, queries)
    assert all(parameter is not other for parameter in trainer.model.parameters() for other in teacher.parameters())
    trainer.save_model(tmp_path / "saved")
    saved = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "saved")
    assert sum(p.numel() for p in saved.parameters()) == sum(p.numel() for p in tiny_model().parameters())


def test_teacher_runs_under_the_same_autocast(shapes, tmp_path):
    """HF_NOTES 15: under bf16 the teacher is outside autocast unless placed in it."""
    trainer = shapes_trainer(shapes, tmp_path, bf16=True, max_steps=1)
    dtypes = {}

    def note(name):
        return lambda module, inputs, output: dtypes.setdefault(name, []).append(output.dtype)

    for name, model in (("teacher", trainer.teacher.detector), ("student", trainer.model)):
        model.model.decoder.layers[0].mlp.fc1.register_forward_hook(note(name))
        model.class_labels_classifier.register_forward_hook(note(f"{name}'s head"))
    trainer.train()
    assert dtypes["teacher"] == dtypes["student"] == [torch.bfloat16]
    assert dtypes["teacher's head"] == dtypes["student's head"] == [torch.float32]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert np.isfinite(training_logs(trainer)[0]["loss"])


def test_evaluation_runs_in_mixed_precision(shapes, tmp_path):
    """As training does; what it finds is scaled in float32 all the same."""
    trainer, dtypes = shapes_trainer(shapes, tmp_path, bf16=True), set()
    layer = trainer.model.model.decoder.layers[0].mlp.fc1
    layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.evaluate()
    assert dtypes == {torch.bfloat16}


def stock_metrics(stock, dataset, annotations, masked=True) -> list[float]:
    """COCOeval's twelve figures of a stock model that sees one image at a time, on a canvas of the largest size."""
    processor, results = load_image_processor(None, SIDE, SIDE), []
    for index in range(len(dataset)):
        image, row = dataset.read_image(index), dataset.rows[index]
        pixels = processor(images=image, do_pad=False, return_tensors="pt")["pixel_values"][0]
        canvas, mask = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, SIDE, SIDE, dtype=torch.int64)
        canvas[0, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        mask[0, : pixels.shape[1], : pixels.shape[2]] = 1
        with torch.no_grad():
            outputs = stock(canvas, pixel_mask=mask if masked else torch.ones_like(mask))
        scores, places = outputs.logits.sigmoid().flatten().topk(min(100, outputs.logits.numel()))
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            x, y, w, h = outputs.pred_boxes[0, place // 3].tolist()
            width, height = row["width"], row["height"]
            results.append(
                {
                    "image_id": row["image_id"],
                    "category_id": dataset.category_ids[place % 3],
                    "bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height],
                    "score": score,
                }
            )
    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize("sizes", ["one size", "two sizes"])
def test_evaluation_equals_cocoeval_image_by_image(shapes, two_sizes, tmp_path, sizes):
    """HF_NOTES 13: ragged labels and a last batch of one must lose nothing; ground truth is the untouched JSON.

    Nor may padding be seen: images of two sizes share a batch.
    """
    folder = shapes if sizes == "one size" else two_sizes
    trainer = shapes_trainer(folder, tmp_path, student=tiny_model(seed=4, num_queries=20))
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "student")
    stock = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "student").eval()
    data = trainer.eval_dataset, folder / "annotations" / "val.json"
    expected = stock_metrics(stock, *data)
    assert metrics["eval_AP"] == pytest.approx(expected[0], abs=1e-6)
    assert metrics["eval_AP50"] == pytest.approx(expected[1], abs=1e-6)
    assert metrics["eval_AR_100"] == pytest.approx(expected[8], abs=1e-6)
    assert expected[8] > 0.01  # something was found, so the comparison says something
    if sizes == "two sizes":
        assert stock_metrics(stock, *data, masked=False) != pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_evaluation_is_of_all_images_though_training_drops_the_last(shapes, tmp_path, batch_size):
    """Those left over, or all of a split that is smaller than a batch, would count as missed without a word."""
    options = {"dataloader_drop_last": True, "per_device_eval_batch_size": batch_size}
    trainer = shapes_trainer(shapes, tmp_path, student=tiny_model(seed=4, num_queries=20), **options)
    data = trainer.eval_dataset
    assert len(data) % batch_size  # some are left over
    found = trainer.evaluate()["eval_AR_100"]
    detections = torch.cat([predict_detections(trainer.model, data.select([index]), 1) for index in range(len(data))])
    assert found == pytest.approx(average_precision_of(detections, data)["AR_100"], abs=1e-6) and found > 0.01
    assert trainer.args.dataloader_drop_last


def test_every_evaluation_reads_the_ground_truth_of_its_own_data_set(shapes, tmp_path):
    """One trainer evaluates several: the images of the first must not be looked up for the next."""
    trainer = shapes_trainer(shapes, tmp_path, student=tiny_model(seed=4, num_queries=20))
    first = trainer.evaluate()["eval_AR_100"]
    second = trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")["train_AR_100"]
    trainer.model.train()
    expected = [
        average_precision_of(predict_detections(trainer.model, data, batch_size=5), data)["AR_100"]
        for data in (trainer.eval_dataset, trainer.train_dataset)
    ]
    assert not trainer.model.training
    assert [first, second] == pytest.approx(expected, abs=1e-6)
    assert first != pytest.approx(second, abs=1e-3)


def test_detections_count_for_the_image_whose_id_came_with_them(shapes, tmp_path):
    """A sampler may hand out images in another order than the data set's."""
    trainer = shapes_trainer(shapes, tmp_path, student=tiny_model(seed=4, num_queries=20))
    expected = trainer.evaluate()["eval_AR_100"]
    detections, ids = predict_detections(trainer.model, trainer.eval_dataset, batch_size=5), trainer.eval_dataset.rows
    backwards = EvalPrediction(detections.flip(0).numpy(), np.array(ids["image_id"])[::-1])
    assert trainer._average_precision(backwards)["AR_100"] == pytest.approx(expected, abs=1e-6) != 0


def test_resumed_run_equals_an_uninterrupted_one(shapes, tmp_path):
    """Trainer's own loading leaves most of Conditional DETR at its start values: published names differ.

    The teacher is wider, so that the learned projection must be resumed too.
    """
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    teacher = tiny_model(seed=1, d_model=48)
    whole = shapes_trainer(shapes, tmp_path / "whole", teacher=teacher, **options)
    whole.train()

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    broken = shapes_trainer(shapes, tmp_path / "broken", teacher=teacher, callbacks=[Interrupt()], **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    student = tiny_model(seed=7)  # other weights: everything must come from the checkpoint
    resumed = shapes_trainer(shapes, tmp_path / "broken", student=student, teacher=teacher, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    torch.testing.assert_close(weights_of(resumed.model), weights_of(whole.model), rtol=1e-5, atol=1e-6)


def test_best_model_is_loaded_at_the_end(shapes, tmp_path):
    trainer = shapes_trainer(
        shapes,
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,  # by AP: Transformers' own default is a loss that is not computed
        learning_rate=0.05,
    )
    trainer.train()
    best = ConditionalDetrForObjectDetection.from_pretrained(trainer.state.best_model_checkpoint)
    own = trainer.model.to_stock().state_dict()
    assert all(torch.equal(value, own[name]) for name, value in best.state_dict().items())


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_stops_with_step_images_and_checkpoint(shapes, tmp_path, where):
    """The last checkpoint is kept; HF_NOTES 12: NaN logits would match arbitrarily and in silence."""

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                poisoned = model if where == "student" else trainer.teacher.detector
                with torch.no_grad():
                    poisoned.class_labels_classifier.weight.fill_(float("nan"))

    trainer = shapes_trainer(shapes, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, callbacks=[Poison()])
    with pytest.raises(NonFiniteLossError, match=r"step 3, image ids \[\d+.*checkpoint-2"):
        trainer.train()
    kept = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "checkpoint-2")
    assert all(value.isfinite().all() for value in kept.state_dict().values())


def test_nan_in_an_evaluation_stops_with_step_and_image(shapes, tmp_path):
    """It would pass for a model that finds nothing."""
    trainer = shapes_trainer(shapes, tmp_path)
    with torch.no_grad():
        trainer.model.bbox_predictor.layers[-1].bias.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="evaluation after step 0: image id .* not finite"):
        trainer.evaluate()


def test_nan_term_is_named(shapes, tmp_path):
    trainer = shapes_trainer(shapes, tmp_path)
    inputs, original = batch_of(trainer, 2), trainer.objective

    def poisoned(*arguments):
        terms, statistics = original(*arguments)
        terms["auxiliary/prediction"] = terms["auxiliary/prediction"] * torch.tensor([1.0, float("nan"), 1.0])
        return terms, statistics

    poisoned.start_teacher_assignment = original.start_teacher_assignment
    trainer.objective = poisoned
    message = r"image ids \[1, 2\]: loss term auxiliary/prediction \(layer 1\) is NaN.*no checkpoint"
    trainer.model.eval()
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.compute_loss(trainer.model, inputs)
    assert not (tmp_path / "not_finite").exists()  # no step of a training
    trainer.create_optimizer()
    trainer.training_step(trainer.model, inputs)
    with pytest.raises(NonFiniteLossError, match=message):
        trainer._get_grad_norm(trainer.model)


def test_backbone_has_its_own_learning_rate(shapes, tmp_path):
    trainer = shapes_trainer(shapes, tmp_path, learning_rate=1e-4, backbone_learning_rate=1e-5)
    groups = {group["lr"]: group for group in trainer.create_optimizer().param_groups}
    backbone = {id(p) for name, p in trainer.model.named_parameters() if ".backbone." in name}
    assert {id(p) for p in groups[1e-5]["params"]} == backbone
    assert len(groups[1e-4]["params"]) + len(backbone) == len(list(trainer.model.parameters()))
    assert all(group["weight_decay"] == 1e-4 for group in groups.values())
    assert trainer.args.max_grad_norm == 0.1 and trainer.args.ddp_find_unused_parameters is False


def test_logged_learning_rate_is_not_the_backbones(shapes, tmp_path):
    trainer = shapes_trainer(shapes, tmp_path, max_steps=1, learning_rate=1e-4, backbone_learning_rate=1e-5)
    trainer.train()
    assert training_logs(trainer)[0]["learning_rate"] == pytest.approx(1e-4)


def test_given_optimizer_class_is_used(shapes, tmp_path):
    from d3etr_hf.publishing.hub_trainer import D3etrTrainer

    trainer = shapes_trainer(shapes, tmp_path)
    trainer = D3etrTrainer(
        model=trainer.model,
        args=trainer.args,
        teacher=trainer.teacher.detector,
        train_dataset=trainer.train_dataset,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-3}),
    )
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)
    with pytest.raises(ValueError, match="model_init is not supported"):
        D3etrTrainer(model=trainer.model, args=trainer.args, model_init=tiny_model)


def test_logs_after_resuming_are_means_too(shapes, tmp_path):
    """The first entry after a resume covers one step, not all before it; and so after a second `train`."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 4}
    shapes_trainer(shapes, tmp_path, **options).train()
    resumed = shapes_trainer(shapes, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    for _ in range(2):
        entry = training_logs(resumed)[-1]
        terms = [value for name, value in entry.items() if name.startswith("loss/")]
        assert sum(terms) == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["matched_foreground"] == pytest.approx(1.0)
        resumed.train()


def test_gradient_norms_do_not_depend_on_how_a_step_is_accumulated(shapes, tmp_path):
    """The norm of one batch's gradient as if it were the whole step: equal batches give equal norms."""
    train = load_shapes(shapes, "train").select([0, 0, 0, 0])
    entries = []
    for size, accumulated in ((4, 1), (1, 4)):
        trainer = shapes_trainer(
            shapes,
            tmp_path / str(size),
            train=train,
            max_steps=1,
            log_gradient_norms=True,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        )
        trainer.train()
        entries.append(training_logs(trainer)[0])
    names = [name for name in entries[0] if name.startswith("gradient_norm/")]
    assert len(names) == 12
    for name in names:
        assert entries[1][name] == pytest.approx(entries[0][name], rel=1e-3), name


def test_student_of_a_second_trainer_gets_a_new_auxiliary_group(shapes, tmp_path):
    """Running a notebook cell again must not keep the first teacher's queries, nor the way to carry them."""
    student = tiny_model(seed=2)
    shapes_trainer(shapes, tmp_path, student=student, teacher=tiny_model(seed=1, d_model=48))
    assert student.query_adapters[AUXILIARY].projection.weight.shape == (32, 48)
    teacher = tiny_model(seed=5)
    trainer = shapes_trainer(shapes, tmp_path, student=student, teacher=teacher)
    assert list(student.query_adapters) == [AUXILIARY] and not list(student.query_adapters.parameters())
    queries = trainer.queries.further(None)[AUXILIARY]
    assert torch.equal(queries.position, teacher.model.query_position_embeddings.weight)
    shapes_trainer(shapes, tmp_path, student=student, teacher=None)
    assert len(student.query_adapters) == 0


def test_classes_of_data_and_student_must_agree(shapes, tmp_path):
    names = ["triangle", "rectangle", "circle"]
    other = tiny_model(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    with pytest.raises(IncompatibleDataError, match=r"train_dataset has the classes \['circle'.*\['triangle'"):
        shapes_trainer(shapes, tmp_path, student=other)
    train = torch.utils.data.Subset(load_shapes(shapes, "train"), [0, 1])
    with pytest.raises(IncompatibleDataError, match="train_dataset is a Subset"):
        shapes_trainer(shapes, tmp_path, train=train)


def test_teacher_and_student_must_be_two_models(shapes, tmp_path):
    model = tiny_model()
    with pytest.raises(IncompatibleTeacherError, match="one and the same"):
        shapes_trainer(shapes, tmp_path, student=model, teacher=model)


def test_backbone_learning_rate_zero_freezes_it(shapes, tmp_path):
    trainer = shapes_trainer(shapes, tmp_path, backbone_learning_rate=0.0)
    before = weights_of(trainer.model.model.backbone)
    trainer.train()
    assert torch.equal(weights_of(trainer.model.model.backbone), before)
    # its gradient would count for the norm that is clipped
    assert not [p for p in trainer.model.model.backbone.parameters() if p.requires_grad or p.grad is not None]


@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate_drops_once_to_a_tenth(shapes, tmp_path, warmup):
    """After a linear warmup, where there is one; and so for the backbone's own."""
    used = []

    class KeepRates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            used.append({group["lr"] for group in optimizer.param_groups})

    options = {"learning_rate": 1e-3, "backbone_learning_rate": 2e-4, "warmup_steps": warmup}
    trainer = shapes_trainer(shapes, tmp_path, max_steps=5, learning_rate_drop=0.8, callbacks=[KeepRates()], **options)
    trainer.train()
    expected = []
    for step in range(1, 6):
        factor = step / warmup if step < warmup else 1.0 if step <= 4 else 0.1
        expected.append(factor)
    assert [max(rates) for rates in used] == pytest.approx([1e-3 * factor for factor in expected])
    assert [min(rates) for rates in used] == pytest.approx([2e-4 * factor for factor in expected])
    assert [entry["learning_rate"] for entry in training_logs(trainer)] == pytest.approx(
        [1e-3 * factor for factor in expected]
    )


def test_worker_processes_hand_over_the_same_batches(two_sizes, tmp_path):
    """Forked, and started afresh as on other systems, where the data set and its transform must survive pickling."""
    losses = []
    for options in (
        {},
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"},
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"},
    ):
        trainer = shapes_trainer(two_sizes, tmp_path, max_steps=1, **options)
        trainer.train()
        losses.append({name: value for name, value in training_logs(trainer)[0].items() if name.startswith("loss")})
    assert len(losses[0]) == 13
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_teacherless_control_learns_its_queries(shapes, tmp_path):
    trainer = shapes_trainer(
        shapes, tmp_path, teacher=None, auxiliary_queries="learned", adaptive_matching=False, max_steps=2
    )
    queries = trainer.model.query_adapters[AUXILIARY].position
    before = queries.detach().clone()
    assert queries.shape == trainer.model.model.query_position_embeddings.weight.shape
    trainer.train()
    assert (queries - before).abs().max() > 0
    terms = {name for name in training_logs(trainer)[0] if name.startswith("loss/")}
    assert terms == {f"loss/{g}/{t}" for g in ("student", "auxiliary") for t in ("class", "l1", "giou")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None, "auxiliary_queries": "teacher"}, "no.* was given: pass teacher"),
        ({"teacher": None, "auxiliary_queries": "none", "adaptive_matching": True}, "pass teacher"),
        ({"student": tiny_model(decoder_layerdrop=0.1)}, "decoder_layerdrop is 0.1"),
        ({"teacher": ConditionalDetrForObjectDetection(tiny_config())}, "the teacher is a ConditionalDetrFor"),
        ({"layer_map": [0, 1]}, r"layer_map=\[0, 1\]"),
    ],
)
def test_incompatible_models_are_refused_before_the_first_step(shapes, tmp_path, options, message):
    with pytest.raises(IncompatibleTeacherError, match=message):
        shapes_trainer(shapes, tmp_path, **options)


def test_image_processors_must_scale_pixels_alike(shapes, tmp_path):
    from d3etr_hf.publishing.hub_trainer import D3etrTrainer

    trainer = shapes_trainer(shapes, tmp_path)
    other = load_image_processor(None, SIDE, SIDE)
    other.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(IncompatibleTeacherError, match="image_mean"):
        D3etrTrainer(
            model=tiny_model(),
            args=trainer.args,
            teacher=tiny_model(seed=1),
            teacher_processing_class=other,
            processing_class=trainer.processing_class,
            train_dataset=load_shapes(shapes, "train"),
        )


STOCK_READER = """
import json, sys
import torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "d3etr_hf":
            raise ImportError("d3etr_hf cannot be imported here")
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForObjectDetection
model = AutoModelForObjectDetection.from_pretrained(sys.argv[1]).eval()
batch = torch.load(sys.argv[2])
with torch.no_grad():
    outputs = model(**batch)
torch.save({"logits": outputs.logits, "pred_boxes": outputs.pred_boxes, "class": type(model).__module__}, sys.argv[3])
"""


def test_saved_student_is_the_same_where_this_package_is_absent(shapes, tmp_path, fresh_processes):
    """After 50 steps, on a padded batch, in a process that cannot import d3etr_hf; and the same AP."""
    trainer = shapes_trainer(shapes, tmp_path / "run", max_steps=50, logging_steps=50, per_device_train_batch_size=2)
    trainer.train()
    trainer.save_model(tmp_path / "student")
    examples = [trainer.eval_dataset[index] for index in range(3)]
    examples[1]["pixel_values"] = examples[1]["pixel_values"][:, :48, :40]
    batch = {name: value for name, value in DetectionCollator()(examples).items() if name.startswith("pixel")}
    assert (batch["pixel_mask"] == 0).any()
    torch.save(batch, tmp_path / "batch.pt")
    paths = [tmp_path / name for name in ("student", "batch.pt", "out.pt")]
    result = fresh_processes.code(STOCK_READER, *paths, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    theirs = torch.load(tmp_path / "out.pt")
    assert theirs["class"].startswith("transformers.")
    trainer.model.eval()
    with torch.no_grad():
        ours = trainer.model(**batch)
    torch.testing.assert_close(theirs["logits"], ours.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs["pred_boxes"], ours.pred_boxes, atol=1e-5, rtol=0)
    again = load_detector(str(tmp_path / "student"))
    before = trainer.evaluate()["eval_AP"]
    trainer.model = trainer.model_wrapped = again
    assert trainer.evaluate()["eval_AP"] == pytest.approx(before, abs=1e-9) and before > 0
    files = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} <= files
    assert json.loads((tmp_path / "student" / "preprocessor_config.json").read_text())["size"]["shortest_edge"] == SIDE


def test_more_objects_than_queries_are_counted_once(shapes, tmp_path):
    """DETR's class loss is a mean over queries weighted by class: no more objects are held than there are queries."""
    trainer = shapes_trainer(
        shapes, tmp_path, student=tiny_model(2, "detr", num_queries=3), teacher=tiny_model(1, "detr", num_queries=5)
    )
    batch = {"labels": [{"objects": 4}, {"objects": 1}]}
    images, objects, labeled, own, auxiliary = trainer._get_num_items_in_batch([batch], trainer.args.device).tolist()
    assert (images, objects, labeled, own, auxiliary) == (2, 5, 2, 3 + 1, 4 + 1)
    normalisers = trainer.criterion.normalisers(*map(torch.tensor, (objects, own, images * 3)))
    # four queries with an object, two without
    assert float(normalisers["class"]) == pytest.approx(4 + 2 * 0.1) and float(normalisers["l1"]) == 5
