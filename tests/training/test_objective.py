"""The objective as a whole: fixed point, permutation, groups, assignments, classes by name."""

import copy

import pytest
import torch
from transformers import ConvNextConfig

from d3etr_hf.errors import IncompatibleTeacherError
from d3etr_hf.matching import AdaptiveMatcher, HungarianAssigner, Targets
from d3etr_hf.models import AttentionMap, AuxiliaryQueries, DetectorOutput, QueryGroupOutput
from d3etr_hf.training.objective import D3etrObjective, Shares
from d3etr_hf.training.teacher import class_index_by_name, spread_layers
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.tiny import padded_batch, perturb, random_labels, tiny_config, tiny_model

MAPS = {"return_groups": True, "return_self_attention": True, "return_cross_attention": True}
LABELS = random_labels([2, 3])
TARGETS = Targets.from_labels(LABELS)
SHARES = Shares(boxes=torch.tensor(5.0), images=torch.tensor(2.0), average=lambda tensor: tensor)


def objective(tmp_path, config=None, class_index=None, layer_map=None, **options) -> D3etrObjective:
    args = D3etrTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
    config = config or tiny_config()
    class_index = torch.arange(config.num_labels) if class_index is None else class_index
    return D3etrObjective(args, config, class_index, layer_map or list(range(config.decoder_layers)))


def with_queries_of(student, teacher, **options):
    queries = teacher.model.query_position_embeddings.weight
    student.add_query_group(AuxiliaryQueries(queries, student.config.d_model, **options))
    return student


def detached(output: QueryGroupOutput) -> QueryGroupOutput:
    return QueryGroupOutput(
        logits=output.logits.detach().clone(),
        boxes=output.boxes.detach().clone(),
        self_attention=tuple(AttentionMap(*(form.detach().clone() for form in m)) for m in output.self_attention),
        cross_attention=tuple(AttentionMap(*(form.detach().clone() for form in m)) for m in output.cross_attention),
    )


def test_fixed_point_of_the_models(tmp_path):
    """Student = copy of the teacher: attention terms vanish, the matching is the identity."""
    teacher = tiny_model().double()
    student = with_queries_of(copy.deepcopy(teacher), teacher)
    batch = padded_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        teacher_output, student_output = teacher(**batch, **MAPS), student(**batch, **MAPS)
    terms, statistics = objective(tmp_path)(student_output, teacher_output, TARGETS, SHARES)
    for name in ("student/self_attention", "student/cross_attention", "auxiliary/self_attention"):
        assert terms[name].abs().max() < 1e-12
    assert terms["auxiliary/cross_attention"].abs().max() < 1e-12
    pairs = AdaptiveMatcher()(teacher_output.groups[0], student_output.groups[0])
    assert torch.equal(pairs.teacher, torch.arange(7).expand(3, 2, 7))
    assert torch.equal(pairs.student, pairs.teacher)
    assert statistics["matched_foreground"] == 1


def test_fixed_point_has_no_gradient(tmp_path):
    """Equal predictions are a minimum of every distillation term, in both groups, L1 and GIoU included."""
    student = with_queries_of(tiny_model(), tiny_model())
    output = student(**padded_batch(), **MAPS)
    leaves = [detached(group) for group in output.groups]
    for group in leaves:
        maps = [attention.log for attention in (*group.self_attention, *group.cross_attention)]
        for tensor in (group.logits, group.boxes, *maps):
            tensor.requires_grad_()
    teacher = DetectorOutput(groups=(detached(leaves[0]),), memory_mask=output.memory_mask)
    # the auxiliary group holds the teacher's queries here, so both groups equal the teacher's output
    twin = DetectorOutput(groups=(leaves[0], detached(leaves[0])), memory_mask=output.memory_mask)
    for tensor in (twin.groups[1].logits, twin.groups[1].boxes):
        tensor.requires_grad_()
    terms, _ = objective(tmp_path, detection_weight=0.0)(twin, teacher, TARGETS, SHARES)
    assert set(terms) == {
        f"{g}/{t}" for g in ("student", "auxiliary") for t in ("self_attention", "cross_attention", "prediction")
    }
    (terms["student/prediction"] + terms["auxiliary/prediction"]).sum().backward()
    for group in twin.groups:
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
    teacher_output = teacher(**batch, **MAPS)
    run = objective(tmp_path, auxiliary_queries="none")
    terms, _ = run(student(**batch, **MAPS), teacher_output, TARGETS, SHARES)
    shuffled_terms, _ = run(shuffled(**batch, **MAPS), teacher_output, TARGETS, SHARES)
    assert set(terms) == set(shuffled_terms) and len(terms) == 6
    for name, value in terms.items():
        torch.testing.assert_close(shuffled_terms[name], value, rtol=1e-9, atol=1e-12)
    first = AdaptiveMatcher()(teacher_output.groups[0], student(**batch, **MAPS).groups[0])
    second = AdaptiveMatcher()(teacher_output.groups[0], shuffled(**batch, **MAPS).groups[0])
    # query j of the shuffled student is query order[j]: its teacher is that one's
    torch.testing.assert_close(second.teacher, first.teacher[..., order])


@pytest.mark.parametrize("term", ["self_attention", "cross_attention", "prediction"])
def test_each_term_alone_falls_tenfold(tmp_path, term):
    """With detection off, on 8 images. Prediction is counted above the teacher's own entropy, its lower bound."""
    teacher = with_queries_of(tiny_model(seed=1), tiny_model(seed=1))
    student = with_queries_of(tiny_model(seed=2), teacher).train()
    weights = {f"{name}_weight": 0.0 for name in ("self_attention", "cross_attention", "prediction", "detection")}
    run = objective(tmp_path, **(weights | {f"{term}_weight": 1.0}))
    batch, targets = padded_batch(8), Targets.from_labels(random_labels([1] * 8))
    shares = Shares(torch.tensor(8.0), torch.tensor(8.0), lambda tensor: tensor)
    with torch.no_grad():
        output = teacher(**batch, **MAPS)
        teacher_output = DetectorOutput(groups=output.groups[:1], memory_mask=output.memory_mask)
        own = DetectorOutput(groups=(output.groups[0],) * 2, memory_mask=output.memory_mask)
        floor = sum(value.sum() for value in run(own, teacher_output, targets, shares)[0].values())
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=400)
    values = []
    for _ in range(400):
        terms, _ = run(student(**batch, **MAPS), teacher_output, targets, shares)
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
    teacher = tiny_model(seed=1)
    student = with_queries_of(tiny_model(seed=2), teacher).train()
    batch = padded_batch()
    teacher_output = teacher(**batch, **MAPS)  # with a graph: not even a caller who forgot torch.no_grad trains it
    terms, _ = objective(tmp_path)(student(**batch, **MAPS), teacher_output, TARGETS, SHARES)
    sum(value.sum() for value in terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not student.extra_query_groups[0].position_embeddings.requires_grad
    assert student.model.query_position_embeddings.weight.grad.abs().sum() > 0


def test_teacher_classes_are_gathered_by_name(tmp_path):
    """HF_NOTES 8: a 91-class teacher with permuted names; a permuted id2label loads in silence."""
    names = [f"unused {i}" for i in range(88)] + ["triangle", "Circle ", "rectangle"]
    order = torch.randperm(91, generator=torch.Generator().manual_seed(0)).tolist()
    names = [names[i] for i in order]
    many = tiny_config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    torch.manual_seed(3)
    teacher = perturb(type(tiny_model())(many)).eval()
    index = class_index_by_name(many, list(tiny_config().id2label.values()))
    assert [names[i].strip().lower() for i in index] == ["circle", "rectangle", "triangle"]

    few = tiny_model(seed=3)
    few.load_state_dict(
        {name: value[index] if "class_labels" in name else value for name, value in teacher.state_dict().items()}
    )
    student, batch = with_queries_of(tiny_model(seed=2), teacher), padded_batch()
    ours, _ = objective(tmp_path, class_index=index)(
        student(**batch, **MAPS), teacher(**batch, **MAPS), TARGETS, SHARES
    )
    theirs, _ = objective(tmp_path)(student(**batch, **MAPS), few(**batch, **MAPS), TARGETS, SHARES)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


def test_missing_and_ambiguous_classes_are_refused():
    other = tiny_config(id2label={0: "circle", 1: "square", 2: "triangle"}, label2id={})
    with pytest.raises(IncompatibleTeacherError, match="no class named \\['rectangle'\\].*id2label"):
        class_index_by_name(other, list(tiny_config().id2label.values()))
    twice = tiny_config(id2label={0: "circle", 1: "rectangle", 2: "triangle", 3: "Circle"}, label2id={})
    with pytest.raises(IncompatibleTeacherError, match="more than one class named \\['circle'\\]"):
        class_index_by_name(twice, list(tiny_config().id2label.values()))


def test_layers_spread_last_to_last():
    assert spread_layers(6, 6) == [0, 1, 2, 3, 4, 5]
    assert spread_layers(6, 3) == [1, 3, 5]
    assert spread_layers(6, 1) == [5]
    assert spread_layers(3, 6) == [0, 0, 1, 1, 2, 2]
    assert spread_layers(6, 2, [0, 5]) == [0, 5]
    for bad in ([0], [0, 6]):
        with pytest.raises(IncompatibleTeacherError, match="layer_map"):
            spread_layers(6, 2, bad)


def test_everything_unequal_at_once(tmp_path):
    """Depth, width, heads, queries, classes and memory grid of teacher and student all differ."""
    backbone = ConvNextConfig(
        num_stages=3, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], out_features=["stage3"], layer_scale_init_value=1.0
    )
    teacher_config = tiny_config(
        backbone_config=backbone,
        d_model=48,
        decoder_layers=4,
        decoder_attention_heads=6,
        encoder_attention_heads=6,
        num_queries=11,
    )
    torch.manual_seed(5)
    teacher = perturb(type(tiny_model())(teacher_config)).eval()
    student, batch = with_queries_of(tiny_model(seed=2), teacher), padded_batch()
    with torch.no_grad():
        teacher_output = teacher(**batch, **MAPS)
    output = student(**batch, **MAPS)
    assert teacher_output.memory_mask.shape[1:] == (4, 4) and output.memory_mask.shape[1:] == (8, 8)
    run = objective(tmp_path, layer_map=spread_layers(4, 3), prediction_normaliser="boxes")
    terms, statistics = run(output, teacher_output, TARGETS, SHARES)
    loss = sum(value.sum() for value in terms.values())
    loss.backward()
    assert len(terms) == 12 and loss.isfinite() and 0 <= statistics["matched_foreground"] <= 1
    assert student.extra_query_groups[0].projection.weight.grad.abs().sum() > 0


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
    teacher = tiny_model(seed=1)
    student, batch = with_queries_of(tiny_model(seed=2), teacher), padded_batch()
    teacher_group, auxiliary = teacher(**batch, **MAPS).groups[0], student(**batch, **MAPS).groups[1]
    own, its = HungarianAssigner()(auxiliary, TARGETS), HungarianAssigner()(teacher_group, TARGETS)
    assert (own != its).flatten(1).any(1).all()  # else the test could not tell them apart
    expected = own.clone()
    for layer in range(3):
        if layers_from_teacher == "last":
            expected[layer] = its[-1]
        elif layer in layers_from_teacher:
            expected[layer] = its[layer]
    run = objective(tmp_path, auxiliary_assignment=policy)
    output = DetectorOutput(groups=(teacher_group,))
    assert torch.equal(run._assignment("auxiliary", auxiliary, teacher_group, output, TARGETS), expected)
    assert torch.equal(run._assignment("student", auxiliary, teacher_group, output, TARGETS), own)


def test_switches_turn_terms_off(tmp_path):
    teacher = tiny_model(seed=1)
    student, batch = with_queries_of(tiny_model(seed=2), teacher), padded_batch()
    outputs = student(**batch, **MAPS), teacher(**batch, **MAPS), TARGETS, SHARES

    def names(**options):
        return set(objective(tmp_path, **options)(*outputs)[0])

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


def test_detection_weights_and_group_reduction(tmp_path):
    """HF_NOTES 10: the class loss weighs 2; Group DETR averages the groups' losses, D3ETR sums them."""
    student, batch = with_queries_of(tiny_model(seed=2), tiny_model(seed=1)), padded_batch()
    output = student(**batch, **MAPS)
    options = {"auxiliary_queries": "learned", "adaptive_matching": False}
    summed, _ = objective(tmp_path, **options)(output, None, TARGETS, SHARES)
    mean, _ = objective(tmp_path, **options, group_reduction="mean")(output, None, TARGETS, SHARES)
    light = tiny_config(cls_loss_coefficient=1)
    single, _ = objective(tmp_path, light, **options)(output, None, TARGETS, SHARES)
    for name, value in summed.items():
        torch.testing.assert_close(mean[name] * 2, value)
        torch.testing.assert_close(single[name] * (2 if name.endswith("class") else 1), value)


def test_teacher_assignment_is_of_its_own_last_layer(tmp_path):
    """Also where a layer map leaves that layer out."""
    teacher = tiny_model(seed=1, decoder_layers=4)
    student, batch = with_queries_of(tiny_model(seed=2, decoder_layers=2), teacher), padded_batch()
    run = objective(tmp_path, layer_map=[0, 1], auxiliary_assignment="teacher_last_layer_everywhere")
    seen = []
    original = run.assigner
    run.assigner = lambda group, targets, whose="student": (
        seen.append((whose, group)),
        original(group, targets, whose),
    )[1]
    run.assigner.focal_alpha = original.focal_alpha
    run.assigner.focal_gamma = original.focal_gamma
    teacher_output = teacher(**batch, **MAPS)
    run(student(**batch, **MAPS), teacher_output, TARGETS, SHARES)
    (last,) = [group for whose, group in seen if whose.startswith("teacher")]
    assert torch.equal(last.logits[0], teacher_output.groups[0].logits[3])


def test_surplus_query_groups_are_refused(tmp_path):
    student = with_queries_of(with_queries_of(tiny_model(), tiny_model()), tiny_model())
    with pytest.raises(ValueError):
        objective(tmp_path)(student(**padded_batch(), **MAPS), None, TARGETS, SHARES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary_queries": "Teacher"}, "auxiliary_queries='Teacher': choose one of"),
        ({"group_reduction": "average"}, "group_reduction='average'.*sum.*mean"),
        ({"adaptive_matching": "false"}, "adaptive_matching='false': must be true or false"),
        ({"detection_weight": 0.0, "adaptive_matching": False, "fixed_matching": False}, "every loss is off"),
        ({"prediction_weight": -1.0}, "prediction_weight=-1.0: must be 0 or more"),
        ({"class_weight": 0.0, "l1_weight": 0.0, "giou_weight": 0.0}, "at least one must be positive"),
        ({"learning_rate_drop": 1.5}, "learning_rate_drop=1.5: must lie between 0 and 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would drop the boxes"),
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

    off = {"adaptive_matching": False, "fixed_matching": False}
    assert args().reads_teacher_outputs and args(**off).reads_teacher_outputs
    queries_alone = args(**off, auxiliary_assignment="own")
    assert queries_alone.needs_teacher and not queries_alone.reads_teacher_outputs
    assert not args(**off, auxiliary_queries="learned").needs_teacher
    assert args(detection_weight=0.0, prediction_weight=0.0).ddp_find_unused_parameters is True
    assert args().ddp_find_unused_parameters is False


def test_teacher_with_classes_beyond_the_students(tmp_path):
    """The first classes in order need no gathering, but the teacher's others must not be compared."""
    wide = tiny_config(id2label={index: f"class {index}" for index in range(9)})
    teacher = perturb(type(tiny_model())(wide)).eval()
    batch, count = padded_batch(), tiny_config().num_labels
    output = teacher(**batch, **MAPS)
    run = objective(tmp_path, class_index=torch.arange(count))
    aligned = run._aligned(output.groups[0], [0, 2])
    assert output.groups[0].logits.shape[-1] == 9 and count < 9
    assert torch.equal(aligned.logits, output.groups[0].logits[[0, 2]][..., :count])
