"""The objective as a whole: fixed point, permutation, groups, assignments, classes by name."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import ConvNextConfig

from d3etr_hf.errors import IncompatibleTeacherError, NonFiniteCostError
from d3etr_hf.matching import AdaptiveMatcher, TaughtGroup
from d3etr_hf.models.query_adapters import QueryAdapter
from d3etr_hf.outputs import (
    AUXILIARY,
    NO_OBJECT,
    OWN,
    AttentionMap,
    DetectorOutput,
    GroupOutput,
    Queries,
    Supervised,
)
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.objective import D3etrObjective, Shares
from d3etr_hf.training.teacher import Teacher, TeacherOutput, class_index_by_name, spread_layers, with_classes_of
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import (
    normalisers_of,
    padded_batch,
    random_labels,
    random_queries,
    request_for,
    targets_of,
    tiny_config,
    tiny_model,
)

MAPS = request_for(maps=True)
LABELS = random_labels([2, 3])
TARGETS = targets_of(LABELS)
NAMES = list(tiny_config().id2label.values())
CRITERION = tiny_model().criterion()


def shares_of(images: int = 2, objects: int = 5) -> Shares:
    counted = torch.tensor(float(objects))
    held = {OWN: counted, AUXILIARY: counted}
    return Shares(torch.tensor(float(images)), counted, held, average=lambda tensor: tensor)


SHARES = shares_of()


def objective(tmp_path, criterion=CRITERION, **options) -> D3etrObjective:
    args = D3etrTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
    return D3etrObjective(args.distillation, criterion, CRITERION)


def ask(model, batch, depth=3, layer_map=None, names=NAMES) -> TeacherOutput:
    """What a model says as the teacher of a student of so many layers."""
    return Teacher(model, names, depth, layer_map)(batch, MAPS, nullcontext)


def taught(output: GroupOutput) -> TaughtGroup:
    """A raw output in the student's own classes and layers, as a teacher's."""
    return TaughtGroup(output.logits.sigmoid(), output.boxes, output.self_attention, output.cross_attention)


def output_of(student, batch, teacher: TeacherOutput | None) -> DetectorOutput:
    """The student's output, with the teacher's queries in the auxiliary group, whose points the student makes."""
    queries = {}
    if teacher is not None:
        queries[AUXILIARY] = Queries(teacher.queries.content, teacher.queries.position).detach()
    return student(**batch, request=request_for(queries, maps=True))


def step(run, student, batch, teacher: TeacherOutput | None, targets=TARGETS, shares=SHARES):
    """Terms and statistics, as the trainer asks for them."""
    assignment = None if teacher is None else run.start_teacher_assignment(teacher, targets)
    output = student if isinstance(student, DetectorOutput) else output_of(student, batch, teacher)
    return run(output, teacher, targets, shares, assignment)


def detached(output: GroupOutput) -> GroupOutput:
    return GroupOutput(
        logits=output.logits.detach().clone(),
        boxes=output.boxes.detach().clone(),
        self_attention=tuple(AttentionMap(*(form.detach().clone() for form in m)) for m in output.self_attention),
        cross_attention=tuple(AttentionMap(*(form.detach().clone() for form in m)) for m in output.cross_attention),
    )


def teacher_output_of(group: GroupOutput, memory_mask) -> TeacherOutput:
    """A raw group as all that a teacher of the same depth and classes says."""
    last = TaughtGroup(group.logits[-1:].sigmoid(), group.boxes[-1:])
    return TeacherOutput(taught(group), last, Queries(), memory_mask)


def test_fixed_point_of_the_models(tmp_path):
    """Student = copy of the teacher: attention terms vanish, the matching is the identity."""
    teacher = tiny_model().double()
    student, batch = copy.deepcopy(teacher), padded_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    teacher_output = ask(teacher, batch)
    with torch.no_grad():
        student_output = output_of(student, batch, teacher_output)
    terms, statistics = step(objective(tmp_path), student_output, batch, teacher_output)
    for name in ("student/self_attention", "student/cross_attention", "auxiliary/self_attention"):
        assert terms[name].abs().max() < 1e-12
    assert terms["auxiliary/cross_attention"].abs().max() < 1e-12
    pairs = AdaptiveMatcher(CRITERION.scores)(teacher_output.group, student_output.groups[OWN])
    assert torch.equal(pairs.teacher, torch.arange(7).expand(3, 2, 7))
    assert torch.equal(pairs.student, pairs.teacher)
    assert statistics["matched_foreground"] == 1


def test_fixed_point_has_no_gradient(tmp_path):
    """Equal predictions are a minimum of every distillation term, in both groups, L1 and GIoU included."""
    output = tiny_model()(**padded_batch(), request=MAPS)
    teacher = teacher_output_of(detached(output.groups[OWN]), output.memory_mask)
    # the auxiliary group holds the teacher's queries here, so both groups equal the teacher's output
    twin = DetectorOutput(
        groups={name: detached(output.groups[OWN]) for name in (OWN, AUXILIARY)}, memory_mask=output.memory_mask
    )
    for group in twin.groups.values():
        for tensor in (group.logits, group.boxes):
            tensor.requires_grad_()
    terms, _ = objective(tmp_path, detection_weight=0.0)(twin, teacher, TARGETS, SHARES)
    assert set(terms) == {
        f"{g}/{t}" for g in ("student", "auxiliary") for t in ("self_attention", "cross_attention", "prediction")
    }
    (terms["student/prediction"] + terms["auxiliary/prediction"]).sum().backward()
    for group in twin.groups.values():
        assert group.logits.grad.abs().max() < 1e-7
        assert group.boxes.grad.abs().max() < 1e-6


def test_permutation_of_the_student_queries(tmp_path):
    """Permuting the student's queries permutes the matching and changes no loss."""
    teacher, student = tiny_model(seed=1).double(), tiny_model(seed=2).double()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = copy.deepcopy(student)
    with torch.no_grad():
        shuffled.model.query_position_embeddings.weight.copy_(student.model.query_position_embeddings.weight[order])
    batch = padded_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    teacher_output = ask(teacher, batch)
    run = objective(tmp_path, auxiliary_queries="none")
    outputs = [model(**batch, request=MAPS) for model in (student, shuffled)]
    (terms, _), (shuffled_terms, _) = (step(run, output, batch, teacher_output) for output in outputs)
    assert set(terms) == set(shuffled_terms) and len(terms) == 6
    for name, value in terms.items():
        torch.testing.assert_close(shuffled_terms[name], value, rtol=1e-9, atol=1e-12)
    matcher = AdaptiveMatcher(CRITERION.scores)
    first, second = (matcher(teacher_output.group, output.groups[OWN]) for output in outputs)
    # query j of the shuffled student is query order[j]: its teacher is that one's
    torch.testing.assert_close(second.teacher, first.teacher[..., order])


@pytest.mark.parametrize("term", ["self_attention", "cross_attention", "prediction"])
def test_each_term_alone_falls_tenfold(tmp_path, term):
    """With detection off, on 8 images. Prediction is counted above the teacher's own entropy, its lower bound."""
    student = tiny_model(seed=2).train()
    weights = {f"{name}_weight": 0.0 for name in ("self_attention", "cross_attention", "prediction", "detection")}
    run = objective(tmp_path, **(weights | {f"{term}_weight": 1.0}))
    batch, targets, shares = padded_batch(8), targets_of(random_labels([1] * 8)), shares_of(8, 8)
    teacher_output = ask(tiny_model(seed=1), batch)
    with torch.no_grad():
        output = tiny_model(seed=1)(**batch, request=MAPS)
        own = DetectorOutput(
            groups=dict.fromkeys((OWN, AUXILIARY), output.groups[OWN]), memory_mask=output.memory_mask
        )
        floor = sum(value.sum() for value in step(run, own, batch, teacher_output, targets, shares)[0].values())
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=400)
    values = []
    for _ in range(400):
        terms, _ = step(run, student, batch, teacher_output, targets, shares)
        loss = sum(value.sum() for value in terms.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        values.append(float(loss.detach() - floor))
        if values[-1] < values[0] / 10:
            break
    assert all(name.endswith(term) for name in terms)
    assert min(values) < values[0] / 10, f"{values[0]} fell only to {min(values)}"


def test_no_gradient_into_the_teacher_or_its_queries(tmp_path):
    student, batch = tiny_model(seed=2).train(), padded_batch()
    teacher = Teacher(tiny_model(seed=1), NAMES, 3)
    assert not any(parameter.requires_grad for parameter in teacher.detector.parameters())
    teacher.detector.requires_grad_(True)  # not even one that somebody has set free is trained
    teacher_output = teacher(batch, MAPS, nullcontext)
    terms, _ = step(objective(tmp_path), student, batch, teacher_output)
    sum(value.sum() for value in terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.detector.parameters())
    for queries in (teacher.queries(), teacher_output.queries.detach()):
        assert not queries.position.requires_grad and not queries.anchors.requires_grad
    assert student.model.query_position_embeddings.weight.grad.abs().sum() > 0


def test_teacher_classes_are_gathered_by_name(tmp_path):
    """HF_NOTES 8: a 91-class teacher with permuted names; a permuted id2label loads in silence."""
    names = [f"unused {i}" for i in range(88)] + ["triangle", "Circle ", "rectangle"]
    order = torch.randperm(91, generator=torch.Generator().manual_seed(0)).tolist()
    names = [names[i] for i in order]
    teacher = tiny_model(3, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    index = class_index_by_name(teacher, NAMES)
    assert [names[i].strip().lower() for i in index] == ["circle", "rectangle", "triangle"]

    few = tiny_model(seed=3)
    few.load_state_dict(
        {name: value[index] if "class_labels" in name else value for name, value in teacher.state_dict().items()}
    )
    student, batch = tiny_model(seed=2), padded_batch()
    ours, theirs = (step(objective(tmp_path), student, batch, ask(model, batch))[0] for model in (teacher, few))
    assert len(theirs) == 12
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


def test_missing_and_ambiguous_classes_are_refused():
    other = tiny_model(id2label={0: "circle", 1: "square", 2: "triangle"}, label2id={})
    with pytest.raises(IncompatibleTeacherError, match="no class named \\['rectangle'\\].*id2label"):
        class_index_by_name(other, NAMES)
    similar = tiny_model(id2label={0: "Rectangles", 1: "circle", 2: "triangle"}, label2id={})
    with pytest.raises(
        IncompatibleTeacherError, match="""--rename_classes '{"rectangle": "Rectangles"}'; set id2label"""
    ):
        class_index_by_name(similar, NAMES)
    twice = tiny_model(id2label={0: "circle", 1: "rectangle", 2: "triangle", 3: "Circle"}, label2id={})
    with pytest.raises(IncompatibleTeacherError, match="more than one class named \\['circle'\\]"):
        class_index_by_name(twice, NAMES)


def test_layers_spread_last_to_last():
    assert spread_layers(6, 6) == [0, 1, 2, 3, 4, 5]
    assert spread_layers(6, 3) == [1, 3, 5]
    assert spread_layers(6, 1) == [5]
    assert spread_layers(3, 6) == [0, 0, 1, 1, 2, 2]
    assert spread_layers(6, 2, [0, 5]) == [0, 5]
    for bad in ([0], [0, 6]):
        with pytest.raises(IncompatibleTeacherError, match="layer_map"):
            spread_layers(6, 2, bad)


@pytest.mark.parametrize("space", ["auto", "moments"])
def test_everything_unequal_at_once(tmp_path, space):
    """Depth, width, heads, queries, classes and memory grid of teacher and student all differ."""
    backbone = ConvNextConfig(
        num_stages=3, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], out_features=["stage3"], layer_scale_init_value=1.0
    )
    teacher = tiny_model(
        5,
        backbone_config=backbone,
        d_model=48,
        decoder_layers=4,
        decoder_attention_heads=6,
        encoder_attention_heads=6,
        num_queries=11,
    )
    student, batch = tiny_model(seed=2), padded_batch()
    student.query_adapters[AUXILIARY] = QueryAdapter(teacher.width, student.width)
    teacher_output = ask(teacher, batch)
    output = output_of(student, batch, teacher_output)
    assert teacher_output.memory_mask.shape[1:] == (4, 4) and output.memory_mask.shape[1:] == (8, 8)
    run = objective(tmp_path, prediction_normaliser="boxes", cross_attention_space=space)
    terms, statistics = step(run, output, batch, teacher_output)
    loss = sum(value.sum() for value in terms.values())
    loss.backward()
    assert len(terms) == 12 and loss.isfinite() and 0 <= statistics["matched_foreground"] <= 1
    assert student.query_adapters[AUXILIARY].projection.weight.grad.abs().sum() > 0


def test_a_batch_is_its_part_of_an_accumulated_step(tmp_path):
    """Of twice as many images what the teacher says counts half; ground truth is divided by the objects alone."""
    student, batch = tiny_model(seed=2), padded_batch()
    teacher = ask(tiny_model(seed=1), batch)
    output = output_of(student, batch, teacher)
    run = objective(tmp_path, prediction_normaliser="boxes")
    whole, part = (step(run, output, batch, teacher, shares=shares_of(images))[0] for images in (2, 4))
    assert len(whole) == 12
    for name, term in whole.items():
        of_truth = name.endswith(("/class", "/l1", "/giou"))
        torch.testing.assert_close(part[name], term if of_truth else term / 2)


@pytest.mark.parametrize(
    ("policy", "layers_from_teacher"),
    [
        ("own", []),
        ("teacher_last_layer", [2]),
        ("teacher_per_layer", [0, 1, 2]),
        ("teacher_last_layer_everywhere", "last"),
    ],
)
def test_auxiliary_assignment(tmp_path, policy, layers_from_teacher):
    student, batch = tiny_model(seed=2), padded_batch()
    teacher = ask(tiny_model(seed=1), batch)
    output = output_of(student, batch, teacher)
    own = CRITERION.assign(output.groups[AUXILIARY], TARGETS)
    raw = tiny_model(seed=1)(**batch, request=MAPS).groups[OWN]
    its = CRITERION.assign(raw, TARGETS)
    assert (own != its).flatten(1).any(1).all()  # else the test could not tell them apart
    expected = own.clone()
    for layer in range(3):
        if layers_from_teacher == "last":
            expected[layer] = its[-1]
        elif layer in layers_from_teacher:
            expected[layer] = its[layer]
    run = objective(tmp_path, auxiliary_assignment=policy)
    seen = []
    run._detection_terms = lambda student, targets, assignments, of_boxes, shares: seen.append(assignments) or {}
    step(run, output, batch, teacher)
    (assignments,) = seen
    assert set(assignments) == {OWN, AUXILIARY}
    assert torch.equal(assignments[AUXILIARY], expected)
    assert torch.equal(assignments[OWN], CRITERION.assign(output.groups[OWN], TARGETS))


def test_switches_turn_terms_off(tmp_path):
    student, batch = tiny_model(seed=2), padded_batch()
    teacher = ask(tiny_model(seed=1), batch)
    output = output_of(student, batch, teacher)

    def names(**options):
        return set(step(objective(tmp_path, **options), output, batch, teacher)[0])

    detection = {f"{g}/{t}" for g in ("student", "auxiliary") for t in ("class", "l1", "giou")}
    distilled = {"self_attention", "cross_attention", "prediction"}
    assert names() == detection | {f"{g}/{t}" for g in ("student", "auxiliary") for t in distilled}
    assert names(fixed_matching=False) == detection | {f"student/{t}" for t in distilled}
    assert names(adaptive_matching=False) == detection | {f"auxiliary/{t}" for t in distilled}
    assert names(adaptive_matching=False, fixed_matching=False) == detection
    assert names(self_attention_weight=0.0, prediction_weight=0.0, detection_weight=0.0) == {
        "student/cross_attention",
        "auxiliary/cross_attention",
    }


def test_groups_that_are_distilled():
    assert Distillation().distilled_groups == (OWN, AUXILIARY)
    assert Distillation(adaptive_matching=False).distilled_groups == (AUXILIARY,)
    assert Distillation(fixed_matching=False).distilled_groups == (OWN,)
    assert Distillation(auxiliary_queries="learned").distilled_groups == (OWN,)
    assert Distillation(auxiliary_queries="none").distilled_groups == (OWN,)
    off = {"self_attention_weight": 0.0, "cross_attention_weight": 0.0, "prediction_weight": 0.0}
    assert Distillation(**off).distilled_groups == ()


def test_detection_weights_and_group_reduction(tmp_path):
    """HF_NOTES 10: the class loss weighs 2; Group DETR averages the groups' losses, D3ETR sums them."""
    student, batch = tiny_model(seed=2), padded_batch()
    output = output_of(student, batch, ask(tiny_model(seed=1), batch))
    options = {"auxiliary_queries": "learned", "adaptive_matching": False}
    summed, _ = objective(tmp_path, **options)(output, None, TARGETS, SHARES)
    mean, _ = objective(tmp_path, **options, group_reduction="mean")(output, None, TARGETS, SHARES)
    light = tiny_model(cls_loss_coefficient=1).criterion()
    single, _ = objective(tmp_path, light, **options)(output, None, TARGETS, SHARES)
    assert len(summed) == 6
    for name, value in summed.items():
        torch.testing.assert_close(mean[name] * 2, value)
        torch.testing.assert_close(single[name] * (2 if name.endswith("class") else 1), value)


def test_class_loss_of_a_softmax_student_is_divided_by_its_queries(tmp_path):
    """Group by group: those without an object weigh a tenth, and objects beyond a group's queries do not count."""
    student, labels = tiny_model(seed=2, model_type="detr"), random_labels([9, 1])
    criterion, targets = student.criterion(), targets_of(labels)
    request = request_for({AUXILIARY: random_queries(5)})
    output = student(**padded_batch(), request=request)
    held = {OWN: torch.tensor(8.0), AUXILIARY: torch.tensor(6.0)}
    shares = Shares(torch.tensor(2.0), torch.tensor(10.0), held, average=lambda tensor: tensor)
    run = objective(tmp_path, criterion, auxiliary_queries="learned", adaptive_matching=False)
    terms, _ = run(output, None, targets, shares)
    for name, title, queries in ((OWN, "student", 7), (AUXILIARY, AUXILIARY, 5)):
        group = output.groups[name]
        losses = criterion.losses(group, targets, criterion.assign(group, targets))
        divided = normalisers_of(criterion, [9, 1], queries)
        assert divided["class"] == pytest.approx({7: 8 + 0.1 * 6, 5: 6 + 0.1 * 4}[queries])
        for term, value in losses.items():
            torch.testing.assert_close(terms[f"{title}/{term}"], value * criterion.weights[term] / divided[term])


def test_teacher_assignment_is_of_its_own_last_layer(tmp_path):
    """Also where a layer map leaves that layer out."""
    targets = targets_of(random_labels([6, 7], seed=3))
    model, batch = tiny_model(seed=1, decoder_layers=4), padded_batch()
    teacher = ask(model, batch, depth=2, layer_map=[0, 1])
    run = objective(tmp_path, auxiliary_assignment="teacher_last_layer_everywhere")
    assigned = run.start_teacher_assignment(teacher, targets)()
    every_layer = CRITERION.assign(model(**batch, request=MAPS).groups[OWN], targets)
    assert torch.equal(assigned, every_layer[3:]) and not torch.equal(assigned, every_layer[1:2])
    student = tiny_model(seed=2, decoder_layers=2)
    seen = []
    run._detection_terms = lambda student, targets, assignments, of_boxes, shares: seen.append(assignments) or {}
    step(run, student, batch, teacher, targets)
    assert torch.equal(seen[0][AUXILIARY], every_layer[3:].expand(2, -1, -1))


def test_the_teacher_assigns_by_its_own_costs():
    """As its family does, whatever the student's."""
    model, batch = tiny_model(seed=1, bbox_cost=0, giou_cost=0), padded_batch()
    run = D3etrObjective(Distillation(), CRITERION, model.criterion())
    found = run.start_teacher_assignment(ask(model, batch), TARGETS)()
    last = model(**batch, request=MAPS).groups[OWN]
    last = GroupOutput(logits=last.logits[-1:], boxes=last.boxes[-1:])
    assert torch.equal(found, model.criterion().assign(last, TARGETS))
    assert not torch.equal(found, CRITERION.assign(last, TARGETS))


def test_surplus_query_groups_are_refused(tmp_path):
    batch = padded_batch()
    teacher = ask(tiny_model(), batch)
    queries = dict.fromkeys((AUXILIARY, "third"), teacher.queries)
    output = tiny_model()(**batch, request=request_for(queries, maps=True))
    with pytest.raises(ValueError, match=r"query groups \['third'\] that no term is of"):
        step(objective(tmp_path), output, batch, teacher)


def test_supervised_predictions_get_detection_terms_of_their_own(tmp_path):
    """Proposals that the criterion assigns, and denoising queries that bring their assignment and ask repeatedly."""
    batch = padded_batch()
    output = tiny_model(seed=2)(**batch, request=request_for())
    group = output.groups[OWN]
    denoising = GroupOutput(logits=group.logits[:, :, :4], boxes=group.boxes[:, :, :4])
    assignment = torch.tensor([[0, 1, NO_OBJECT, 0], [2, NO_OBJECT, 1, 0]]).expand(3, 2, 4)
    output.supervised = {
        "proposals": Supervised(group=GroupOutput(logits=group.logits[-1:], boxes=group.boxes[-1:])),
        "denoising": Supervised(group=denoising, assignment=assignment, repeats=2),
    }
    options = {"auxiliary_queries": "none", "adaptive_matching": False}
    terms, _ = objective(tmp_path, **options)(output, None, TARGETS, SHARES)
    assert set(terms) == {
        f"{name}/{term}" for name in ("student", "proposals", "denoising") for term in ("class", "l1", "giou")
    }
    expected = CRITERION.losses(denoising, TARGETS, assignment)
    for term, weight in CRITERION.weights.items():
        torch.testing.assert_close(terms[f"proposals/{term}"], terms[f"student/{term}"][-1:])
        torch.testing.assert_close(terms[f"denoising/{term}"], weight * expected[term] / (2 * 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary_queries": "Teacher"}, "auxiliary_queries='Teacher': choose one of"),
        ({"group_reduction": "average"}, "group_reduction='average'.*sum.*mean"),
        ({"adaptive_matching": "false"}, "adaptive_matching='false': must be true or false"),
        ({"detection_weight": 0.0, "adaptive_matching": False, "fixed_matching": False}, "every loss is off"),
        ({"prediction_weight": -1.0}, "prediction_weight=-1.0: must be 0 or more"),
        (
            {
                "distillation_class_weight": 0.0,
                "distillation_l1_weight": 0.0,
                "distillation_giou_weight": 0.0,
            },
            "at least one must be positive",
        ),
        ({"learning_rate_drop": 1.5}, "learning_rate_drop=1.5: must lie between 0 and 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True: .* would drop the boxes"),
        ({"log_gradient_norms": True, "logging_strategy": "epoch"}, "needs logging_strategy='steps'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches"),
    ],
)
def test_contradicting_options_are_refused(tmp_path, options, message):
    """In Python too: a typo must not run another experiment in silence."""
    with pytest.raises(ValueError, match=message):
        D3etrTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_what_reads_the_teacher(tmp_path):
    def args(**options):
        return D3etrTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)

    def options(**changes):
        return args(**changes).distillation

    off = {"adaptive_matching": False, "fixed_matching": False}
    assert options().reads_teacher_outputs and options(**off).reads_teacher_outputs
    queries_alone = options(**off, auxiliary_assignment="own")
    assert queries_alone.needs_teacher and not queries_alone.reads_teacher_outputs
    assert not options(**off, auxiliary_queries="learned").needs_teacher
    assert args(detection_weight=0.0, prediction_weight=0.0).ddp_find_unused_parameters is True
    assert args().ddp_find_unused_parameters is False


@pytest.mark.parametrize("name", ["class_weight", "l1_weight", "giou_weight"])
def test_options_that_were_renamed_name_their_successor(tmp_path, name):
    with pytest.raises(TypeError, match=f"'{name}' is called 'distillation_{name}' now"):
        D3etrTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: 1.0})


def test_teacher_with_classes_beyond_the_students(tmp_path):
    """The first classes in order need no gathering, but the teacher's others must not be compared."""
    teacher, batch = tiny_model(id2label={index: f"class {index}" for index in range(9)}), padded_batch()
    logits = teacher(**batch, request=MAPS).groups[OWN].logits
    assert logits.shape[-1] == 9
    said = ask(teacher, batch, depth=2, layer_map=[0, 2], names=["class 0", "class 1", "class 2"])
    assert torch.equal(said.group.probabilities, logits.sigmoid()[[0, 2]][..., :3])
    said = ask(teacher, batch, depth=2, layer_map=[0, 2], names=["class 4", "class 1", "class 7"])
    assert torch.equal(said.group.probabilities, logits.sigmoid()[[0, 2]][..., [4, 1, 7]])
    assert torch.equal(said.last.probabilities, logits.sigmoid()[2:][..., [4, 1, 7]])


def test_detector_with_another_order_of_classes_is_reduced_in_a_copy():
    names = ["triangle", "square", "circle", "rectangle"]
    detector, batch = tiny_model(id2label=dict(enumerate(names)), label2id={}), padded_batch()
    same = with_classes_of(tiny_model(), NAMES, "model")
    assert same.class_names == NAMES
    reduced = with_classes_of(detector, NAMES, "model")
    assert reduced is not detector and reduced.class_names == NAMES and detector.class_names == names
    before, after = detector(**batch).logits, reduced(**batch).logits
    assert torch.equal(after, before)  # the head is whole
    torch.testing.assert_close(reduced.scores.probabilities(after), before.sigmoid()[..., [2, 3, 0]])


def test_a_softmax_teachers_other_classes_are_no_object():
    """Renormalised over the student's classes, a query that sees something else would teach one of them."""
    names, batch = ["triangle", "square", "circle"], padded_batch()
    teacher = tiny_model(model_type="detr", id2label=dict(enumerate(names)), label2id={})
    logits = teacher(**batch, request=MAPS).groups[OWN].logits
    said = ask(teacher, batch, depth=1, names=["circle", "triangle"]).last.probabilities
    exponentials = logits[-1].double().exp()
    expected = exponentials[..., [2, 0]] / exponentials.sum(-1, keepdim=True)
    torch.testing.assert_close(said[0].double(), expected, atol=1e-6, rtol=1e-5)
    scores = teacher.criterion().scores
    no_object = exponentials[..., [1, 3]].sum(-1) / exponentials.sum(-1)
    student = torch.randn(*said.shape[1:-1], 3)
    logarithms = student.double().log_softmax(-1)
    wanted = -(expected * logarithms[..., :2]).sum(-1) - no_object * logarithms[..., 2]
    torch.testing.assert_close(scores.entropy(student, said[0]).double(), wanted, atol=1e-5, rtol=1e-5)


def test_costs_that_are_not_finite_stop_the_objective_unless_it_is_told_to_go_on(tmp_path):
    """Predictions of a diverged model would be matched at random."""
    output = tiny_model()(**padded_batch(), request=MAPS)
    teacher = teacher_output_of(detached(output.groups[OWN]), output.memory_mask)
    output.groups[OWN].boxes = output.groups[OWN].boxes * torch.nan
    run = objective(tmp_path, auxiliary_queries="none")
    with pytest.raises(NonFiniteCostError):
        run(output, teacher, TARGETS, SHARES)
    run.tolerant = True
    terms, _ = run(output, teacher, TARGETS, SHARES)
    assert terms["student/prediction"].isnan().all()


def test_teacher_moves_whole():
    """Its weights and its class index, which gathers its scores on the device."""
    teacher = Teacher(tiny_model(), NAMES[::-1], 3)
    assert teacher.to(torch.device("meta")) is teacher
    assert teacher.class_index.is_meta
    assert all(parameter.is_meta for parameter in teacher.detector.parameters())
