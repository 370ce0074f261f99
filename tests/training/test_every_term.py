"""Every named term of `compute_loss` against the method's formulas, computed from the weights of the two models.

Other tests compare the code with itself or a loss with its loop on made-up tensors; here nothing is shared, so that a
wrong normaliser, weight, layer, mask or reference point anywhere between pixels and log is seen.
"""

import pytest
import torch
from transformers import ConditionalDetrForObjectDetection, ConvNextConfig

from d3etr_hf.models import D3etrConditionalDetrForObjectDetection
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.denoising import noised_queries
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.shared_queries import object_queries, random_queries
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests import oracle, slow_reference
from tests.tiny import perturb, random_labels, targets_of, tiny_config

TERMS = ("class", "l1", "giou", "self_attention", "cross_attention", "prediction")
# Rows and columns of the images: every one is padded somewhere in the batch of 64 x 64; the second shows nothing.
SIZES, OBJECTS = [(48, 64), (64, 40), (32, 56)], [3, 0, 2]
# All weights differ from each other and from their defaults; the configuration takes whole numbers only.
CONFIG = {
    "class_cost": 3,
    "bbox_cost": 7,
    "giou_cost": 4,
    "cls_loss_coefficient": 6,
    "bbox_loss_coefficient": 9,
    "giou_loss_coefficient": 8,
    "focal_alpha": 0.31,
}
WEIGHTS = {"detection": 0.8, "self_attention": 1.9, "cross_attention": 0.7, "prediction": 1.4}
COSTS = (1.6, 3.7, 2.9)
STRIDE_16 = ConvNextConfig(
    num_stages=3, hidden_sizes=[8, 16, 16], depths=[1] * 3, out_features=["stage3"], layer_scale_init_value=1.0
)


def stock_model(seed: int, **changes) -> ConditionalDetrForObjectDetection:
    """A stock detector in float64, far from its start values: attention is peaked, scores and boxes are spread."""
    torch.manual_seed(seed)
    model = ConditionalDetrForObjectDetection(tiny_config(**(CONFIG | {"num_queries": 12} | changes)))
    torch.nn.init.normal_(model.model.query_position_embeddings.weight)  # as the paper: the stock start is 0.02 of it
    return perturb(model, 0.3).double().eval()


def examples(objects: list[int] | None = None) -> list[dict]:
    """What the data set hands over: images of three sizes and their labels."""
    generator = torch.Generator().manual_seed(4)
    labels = random_labels(OBJECTS if objects is None else objects, seed=3)
    return [
        {
            "pixel_values": torch.randn(3, *size, generator=generator),
            "labels": label | {"orig_size": torch.tensor(size)},
        }
        for size, label in zip(SIZES, labels, strict=True)
    ]


def padded(images: list[dict], masked: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch and its pixel mask by hand; without `masked` padding counts as image."""
    height, width = (max(side) for side in zip(*SIZES, strict=True))
    pixels = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        _, rows, columns = image["pixel_values"].shape
        pixels[index, :, :rows, :columns] = image["pixel_values"]
        mask[index, :rows, :columns] = 1
    return pixels, mask if masked else torch.ones_like(mask)


def logged_terms(student, teacher, images, folder, settings: oracle.Settings, queries: str, points: str, **baselines):
    """The only touch point with the package: one batch through the trainer.

    Returns:
        The log, the loss, and what trains of the auxiliary group: its projection's weight and bias, or its queries.
    """
    options = {f"{name}_weight": getattr(settings, name) for name in WEIGHTS}
    options |= {
        f"distillation_{name}_weight": cost for name, cost in zip(("class", "l1", "giou"), settings.costs, strict=True)
    }
    args = D3etrTrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        log_each_layer=True,
        auxiliary_queries=queries if queries in ("teacher", "learned") else "none",
        auxiliary_reference_points=points,
        auxiliary_assignment=settings.assignment,
        group_reduction=settings.reduction,
        attention_divergence=settings.divergence,
        prediction_normaliser=settings.normaliser,
        adaptive_matching=settings.adaptive,
        matching_score_threshold=settings.threshold,
        logits_distillation_weight=settings.logits,
        logits_negative_weight=settings.logits_negative,
        logits_layer_weights=list(settings.logits_layers),
        layer_map=settings.layer_map,
        **options,
        **baselines,
    )
    ours = []
    for stock in (student, teacher):
        model = D3etrConditionalDetrForObjectDetection(stock.config).double()
        model.load_state_dict(stock.state_dict())
        ours.append(model)
    trainer = D3etrTrainer(model=ours[0], args=args, teacher=ours[1])
    trainer.model.double()
    known = dict(student.named_parameters())
    extra = [parameter for name, parameter in trainer.model.named_parameters() if name not in known]
    with torch.no_grad():
        for parameter in extra:
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = trainer.data_collator(images)
    batch["pixel_values"] = batch["pixel_values"].double()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    trainer.log({"loss": float(loss.detach())})
    return trainer.state.log_history[-1], float(loss.detach()), [parameter.detach() for parameter in extra]


def expected_terms(student, teacher, images, settings, queries="teacher", points="student", extra=(), masked=True):
    """The oracle on the same batch."""
    pixels, mask = padded(images, masked)
    studying, teaching = oracle.Decoder(student, pixels, mask), oracle.Decoder(teacher, pixels, mask)
    auxiliary_queries, auxiliary_points = teaching.own_queries, None
    if points == "teacher":
        auxiliary_points = teaching.points(auxiliary_queries)
    more: tuple = ()
    branch = None
    if queries in ("one_to_many", "denoising"):
        auxiliary_queries, branch = None, (studying(extra[0]), 3, 0.7) if queries == "one_to_many" else None
    elif queries == "learned":
        auxiliary_queries, *more = extra
    elif extra:
        weight, bias = sorted(extra, key=lambda parameter: -parameter.dim())
        auxiliary_queries = auxiliary_queries @ weight.T + bias
    names = [str(name).strip().lower() for name in teacher.config.id2label.values()]
    return oracle.terms(
        studying(studying.own_queries),
        None if auxiliary_queries is None else studying(auxiliary_queries, auxiliary_points),
        teaching(teaching.own_queries),
        (teaching.mask, studying.mask),
        [image["labels"] for image in images],
        student.config,
        settings,
        [names.index(name) for name in student.config.id2label.values()],
        fixed=queries == "teacher",
        further={f"auxiliary_{number}": studying(group) for number, group in enumerate(more, 2)},
        one_to_many=branch,
    )


def settings(**changes) -> oracle.Settings:
    return oracle.Settings(**(WEIGHTS | {"costs": COSTS, "layer_map": [3, 0, 2]} | changes))


@pytest.fixture(scope="module")
def student():
    return stock_model(2)


@pytest.fixture(scope="module")
def deeper_teacher():
    return stock_model(1, decoder_layers=4)


def names_of(*groups: str) -> set[str]:
    return {f"{group}/{term}" for group in groups for term in TERMS}


def detection_of(group: str) -> set[str]:
    return {f"{group}/{term}" for term in ("class", "l1", "giou")}


def compare(
    student,
    teacher,
    tmp_path,
    queries="teacher",
    points="student",
    objects=None,
    baselines=None,
    further=dict,
    denoising=None,
    unlabeled=(),
    **changes,
):
    """The package against the oracle and what `further` expects of the training arguments `baselines`."""
    options, images = settings(**changes), examples(objects)
    given = [image | ({"labeled": False} if n in unlabeled else {}) for n, image in enumerate(images)]
    log, loss, extra = logged_terms(student, teacher, given, tmp_path, options, queries, points, **(baselines or {}))
    expected = expected_terms(student, teacher, images, options, queries, points, extra) | further()
    if unlabeled:  # the detection loss is that of the other images alone
        labeled = [image for n, image in enumerate(images) if n not in unlabeled]
        of_labeled = expected_terms(student, teacher, labeled, options, queries, points, extra) if labeled else {}
        for name in expected.keys() & (detection_of("student") | detection_of("auxiliary")):
            expected[name] = of_labeled.get(name, [0.0] * len(expected[name]))
    if denoising is not None:
        expected |= denoising_terms(student, extra[0], denoising)
    for name, layers in expected.items():
        assert log[f"loss/{name}"] == pytest.approx(sum(layers), rel=1e-5, abs=1e-9), name
        per_layer = [log[f"loss/{name}/layer_{k}"] for k in range(len(layers))]
        assert per_layer == pytest.approx(layers, rel=1e-5, abs=1e-9), name
    logged = {name.removeprefix("loss/") for name in log if name.startswith("loss/") and "layer_" not in name}
    assert logged == expected.keys()
    assert loss == pytest.approx(sum(map(sum, expected.values())), rel=1e-6)
    return expected


@pytest.mark.parametrize(
    ("assignment", "normaliser", "divergence", "points", "reduction"),
    [
        ("teacher_last_layer", "pairs", "kl", "student", "sum"),
        ("teacher_last_layer_everywhere", "boxes", "mse", "teacher", "mean"),
        ("teacher_per_layer", "pairs", "kl", "teacher", "sum"),
        ("own", "boxes", "mse", "student", "mean"),
    ],
)
def test_every_term(student, deeper_teacher, tmp_path, assignment, normaliser, divergence, points, reduction):
    """Under every option, with a deeper teacher that is followed out of order and images of three sizes."""
    expected = compare(
        student,
        deeper_teacher,
        tmp_path,
        points=points,
        assignment=assignment,
        normaliser=normaliser,
        divergence=divergence,
        reduction=reduction,
    )
    assert expected.keys() == names_of("student", "auxiliary")


@pytest.mark.parametrize(
    ("unlabeled", "assignment", "normaliser"),
    [((1,), "teacher_last_layer", "boxes"), ((0, 2), "own", "pairs"), ((0, 1, 2), "teacher_per_layer", "pairs")],
)
def test_every_term_beside_images_without_labels(student, deeper_teacher, tmp_path, unlabeled, assignment, normaliser):
    """All images are distilled; what is detected in some is compared with nothing, not with an empty image."""
    expected = compare(
        student,
        deeper_teacher,
        tmp_path,
        objects=[3, 4, 2],
        unlabeled=unlabeled,
        assignment=assignment,
        normaliser=normaliser,
    )
    assert expected.keys() == names_of("student", "auxiliary")
    assert (sum(expected["student/class"]) == 0) == (len(unlabeled) == 3)


def test_every_term_of_a_larger_teacher(student, tmp_path):
    """More queries, another width, other heads, another grid, other classes in another order, the other norm."""
    names = ["square", "Triangle", "circle", "rectangle "]
    teacher = stock_model(
        5,
        backbone_config=STRIDE_16,
        d_model=48,
        decoder_layers=4,
        decoder_attention_heads=6,
        encoder_attention_heads=6,
        num_queries=17,
        auxiliary_loss=True,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    expected = compare(student, teacher, tmp_path, points="teacher", normaliser="boxes")
    assert expected.keys() == names_of("student", "auxiliary")


def test_every_term_of_a_smaller_teacher(student, tmp_path):
    """Fewer queries and layers, another width with as many heads, the student's reference points."""
    teacher = stock_model(6, d_model=16, decoder_layers=2, num_queries=8)
    expected = compare(student, teacher, tmp_path, layer_map=[1, 0, 1], divergence="mse")
    assert expected.keys() == names_of("student", "auxiliary")


def test_every_term_beside_learned_queries(student, deeper_teacher, tmp_path):
    """They know ground truth alone."""
    expected = compare(student, deeper_teacher, tmp_path, queries="learned", reduction="mean")
    assert expected.keys() == names_of("student") | detection_of("auxiliary")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_term_of_group_detr(student, deeper_teacher, tmp_path, reduction):
    """Four groups, of which three are learned beside the student's own: each assigned by itself, their losses averaged
    (Chen et al., ICCV 2023) or summed."""
    options = {"auxiliary_groups": 3}
    expected = compare(
        student, deeper_teacher, tmp_path, "learned", baselines=options, reduction=reduction, adaptive=False
    )
    names = ("student", "auxiliary", "auxiliary_2", "auxiliary_3")
    assert expected.keys() == set().union(*map(detection_of, names))


def shared_query_terms(student, teacher, names: dict[str, str], options, images) -> dict[str, list[float]]:
    """KD-DETR's: of random queries, whose reference points both are given, and of the teacher's own."""
    pixels, mask = padded(images)
    studying, teaching = oracle.Decoder(student, pixels, mask), oracle.Decoder(teacher, pixels, mask)
    drawn = random_queries(D3etrConditionalDetrForObjectDetection(teacher.config), 9, seed=42, step=0)
    random = drawn.position.double(), drawn.anchors[:, :2].double()
    given = {"random": (random, random), "own": ((teaching.own_queries, None),) * 2}
    found = {}
    for kind, name in names.items():
        theirs, ours = (decoder(*queries) for decoder, queries in zip((teaching, studying), given[kind], strict=True))
        theirs = theirs.of_layers(options.layer_map, [0, 1, 2])
        parts = slow_reference.shared_query_loss((theirs.logits, theirs.boxes), (ours.logits, ours.boxes), COSTS)
        found[f"{name}/shared_query"] = [1.7 * sum(layer) for layer in zip(*parts, strict=True)]
    return found


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ("teacher", {"random": "random_queries", "own": "auxiliary"}),
        ("learned", {"random": "random_queries", "own": "teacher_queries"}),
        ("learned", {"own": "teacher_queries"}),
    ],
)
def test_every_term_of_kd_detr(student, deeper_teacher, tmp_path, queries, names):
    """The teacher's own queries are decoded once where they are an auxiliary group in any case."""
    options = {"shared_query_weight": 1.7, "shared_random_queries": 9 if "random" in names else 0}
    expected = compare(
        student,
        deeper_teacher,
        tmp_path,
        queries,
        baselines=options,
        further=lambda: shared_query_terms(student, deeper_teacher, names, settings(), examples()),
    )
    assert {f"{name}/shared_query" for name in names.values()} <= expected.keys()


def object_query_terms(student, teacher, options, images) -> list[float]:
    """CLoCKDistill's, each image's objects by themselves; what is divided by are the weights of all images."""
    labels, batch = [image["labels"] for image in images], padded(images)
    queries = object_queries(D3etrConditionalDetrForObjectDetection(teacher.config), targets_of(labels), 3, seed=42)
    logits, boxes = [[], []], [[], []]
    for side, model in enumerate((teacher, student)):
        decoder = oracle.Decoder(model, *batch)
        for image, label in enumerate(labels):
            if (count := len(label["class_labels"])) == 0:
                continue
            found = decoder(queries.content[image, :count].double(), label["boxes"][:, :2].double())
            found = found if side else found.of_layers(options.layer_map, [0, 1, 2])
            logits[side].append(found.logits[:, image])
            boxes[side].append(found.boxes[:, image])
    sides = [tuple(torch.cat(each, dim=1)[:, None] for each in pair) for pair in zip(logits, boxes, strict=True)]
    parts = slow_reference.shared_query_loss(*sides, COSTS)
    return [1.7 * sum(layer) for layer in zip(*parts, strict=True)]


@pytest.mark.parametrize("objects", [OBJECTS, [0, 0, 0]])
def test_every_term_of_clockdistill(student, deeper_teacher, tmp_path, objects):
    """Images with three, none and two objects: nothing is learned of places without one, and nobody sees them."""
    name = "object_queries/shared_query"

    def further() -> dict[str, list[float]]:
        if not any(objects):
            return {name: [0.0] * 3}
        return {name: object_query_terms(student, deeper_teacher, settings(), examples(objects))}

    options = {"shared_query_weight": 1.7, "shared_random_queries": 0, "shared_teacher_queries": False}
    expected = compare(
        student,
        deeper_teacher,
        tmp_path,
        "learned",
        objects=objects,
        baselines=options | {"shared_object_queries": True},
        further=further,
    )
    assert name in expected


def test_every_term_of_h_detr(student, deeper_teacher, tmp_path):
    """A branch of learned queries of which each object is asked three times, beside adaptive matching."""
    options = {"one_to_many_queries": 16, "one_to_many_repeats": 3, "one_to_many_weight": 0.7}
    expected = compare(student, deeper_teacher, tmp_path, "one_to_many", baselines=options, reduction="mean")
    assert expected.keys() == names_of("student") | detection_of("one_to_many")


def denoising_terms(student, embedding, options) -> dict[str, list[float]]:
    """DN-DETR's, image by image and group by group: the student's decoder on boxes and classes with noise."""
    images = examples()
    labels = [image["labels"] for image in images]
    decoder = oracle.Decoder(student, *padded(images))
    ids = [int(label["image_id"]) for label in labels]
    noised = noised_queries(targets_of(labels), ids, 3, options, seed=42, step=0)
    sums = {name: [0.0] * 3 for name in ("class", "l1", "giou")}
    for queries in noised.queries.values():
        for image, label in enumerate(labels):
            count = len(label["class_labels"])
            if count == 0:
                continue
            content, anchors = queries.content[image, :count, 0], queries.anchors[image, :count, :2].double()
            found = decoder(embedding[content], anchors)
            for k in range(3):
                parts = slow_reference.detection_loss(
                    found.logits[k, image : image + 1],
                    found.boxes[k, image : image + 1],
                    [label],
                    torch.arange(count)[None],
                    sum(OBJECTS) * options.denoising_groups,
                    CONFIG["focal_alpha"],
                )
                for name, value in parts.items():
                    sums[name][k] += value
    factors = {"class": "cls_loss_coefficient", "l1": "bbox_loss_coefficient", "giou": "giou_loss_coefficient"}
    return {
        f"noised_queries/{name}": [WEIGHTS["detection"] * CONFIG[factors[name]] * value for value in values]
        for name, values in sums.items()
    }


def test_every_term_of_dn_detr(student, deeper_teacher, tmp_path):
    """Two groups beside distillation: no query sees another image's, another group's or one that is not used."""
    options = Distillation(denoising_groups=2, denoising_box_noise=0.3, denoising_label_noise=0.5)
    baselines = {name: getattr(options, name) for name in ("denoising_groups", "denoising_box_noise")}
    baselines["denoising_label_noise"] = 0.5
    compare(student, deeper_teacher, tmp_path, "denoising", baselines=baselines, denoising=options)


@pytest.mark.parametrize(("normaliser", "divergence"), [("pairs", "kl"), ("boxes", "mse")])
def test_every_term_of_confident_pairs(student, deeper_teacher, tmp_path, normaliser, divergence):
    """Incremental-DETR's: only what the teacher is sure of is matched and learned, in the student's own group."""
    options = {"threshold": 0.935, "normaliser": normaliser, "divergence": divergence}
    expected = compare(student, deeper_teacher, tmp_path, **options)
    everything = expected_terms(student, deeper_teacher, examples(), settings(**(options | {"threshold": 0.0})))
    sums = {name: (sum(layers), sum(everything[name])) for name, layers in expected.items()}
    changed = {name for name, (few, all_of_them) in sums.items() if abs(few - all_of_them) > 1e-3 * all_of_them}
    assert changed == {f"student/{term}" for term in ("self_attention", "cross_attention", "prediction")}


def test_every_term_of_detrdistill(student, deeper_teacher, tmp_path):
    """Beside the teacher's queries as prior, with the teacher's assignment of each layer; of confident pairs, too."""
    options = {"logits": 1.3, "logits_negative": 0.6, "logits_layers": (0.5, 1.0, 2.0)}
    options |= {"assignment": "teacher_per_layer", "threshold": 0.935}
    expected = compare(student, deeper_teacher, tmp_path, **options)
    assert expected.keys() == names_of("student", "auxiliary") | {"student/logits"}
    images = examples()
    for changes in ({"logits_negative": 0.0}, {"logits_layers": (1.0, 1.0, 1.0)}, {"threshold": 0.0}):
        others = expected_terms(student, deeper_teacher, images, settings(**(options | changes)))
        assert others["student/logits"] != pytest.approx(expected["student/logits"], rel=1e-3), changes


def test_every_term_without_any_object(student, deeper_teacher, tmp_path):
    """Sums over no box are divided by one."""
    expected = compare(student, deeper_teacher, tmp_path, objects=[0, 0, 0])
    assert sum(expected["auxiliary/l1"]) == 0 and sum(expected["auxiliary/class"]) > 0


def test_the_cases_can_tell_faults_apart(student, deeper_teacher):
    """Padding, layers, assignments and reference points must matter here, else the tests above say little."""
    images = examples()
    expected = expected_terms(student, deeper_teacher, images, settings())

    def changed(**options) -> set[str]:
        switches = {name: options.pop(name) for name in ("points", "masked") if name in options}
        others = expected_terms(student, deeper_teacher, images, settings(**options), **switches)
        return {name for name, layers in others.items() if abs(sum(layers) - sum(expected[name])) > 1e-4 * sum(layers)}

    assert changed(masked=False) == names_of("student", "auxiliary")
    exchanged = COSTS[0], COSTS[2], COSTS[1]
    assert changed(costs=exchanged) == names_of("student") - detection_of("student") | {"auxiliary/prediction"}
    distilled = names_of("student", "auxiliary") - detection_of("student") - detection_of("auxiliary")
    assert changed(layer_map=[0, 1, 2]) == distilled
    assert changed(points="teacher") == names_of("auxiliary")
    for assignment in ("teacher_last_layer_everywhere", "teacher_per_layer", "own"):
        assert changed(assignment=assignment) == detection_of("auxiliary")


@pytest.mark.parametrize("normed_between", [False, True])
def test_the_oracle_decodes_as_the_stock_class(normed_between):
    """Its last layer's predictions and all its maps, on the padded batch."""
    stock = stock_model(7, auxiliary_loss=normed_between, attn_implementation="eager")
    pixels, mask = padded(examples())
    decoder = oracle.Decoder(stock, pixels, mask)
    found = decoder(decoder.own_queries)
    with torch.no_grad():
        theirs = stock(pixels, pixel_mask=mask, output_attentions=True)
    torch.testing.assert_close(found.logits[-1], theirs.logits, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.boxes[-1], theirs.pred_boxes, rtol=1e-6, atol=1e-7)
    for ours, stocks in ((found.self_maps, theirs.decoder_attentions), (found.cross_maps, theirs.cross_attentions)):
        for layer, attention in zip(ours, stocks, strict=True):
            torch.testing.assert_close(layer, attention, rtol=1e-5, atol=1e-8)
