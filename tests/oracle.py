"""The whole objective once more, from the weights of two stock models to every named term, in float64.

Written from the method alone: nothing of d3etr_hf is imported. The decoder is plain eager attention, each query group
goes through it in a call of its own, losses are the loops of `slow_reference`, assignments are scipy's.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from scipy.optimize import linear_sum_assignment
from transformers import ConditionalDetrForObjectDetection

from tests import slow_reference


@dataclass
class Predictions:
    """What one query group gives: logits (L, B, N, C), boxes (L, B, N, 4), per layer maps (B, M, N, N or H*W)."""

    logits: torch.Tensor
    boxes: torch.Tensor
    self_maps: list[torch.Tensor]
    cross_maps: list[torch.Tensor]

    def of_layers(self, layers: list[int], classes: list[int]) -> "Predictions":
        """These layers only, with these classes in this order."""
        return Predictions(
            self.logits[layers][..., classes],
            self.boxes[layers],
            [self.self_maps[layer] for layer in layers],
            [self.cross_maps[layer] for layer in layers],
        )


class Decoder:
    """Backbone and encoder of a stock model on one padded batch; then its decoder for any queries."""

    def __init__(self, stock: ConditionalDetrForObjectDetection, pixel_values, pixel_mask):
        self.config, self.weights = stock.config, stock.state_dict()
        with torch.no_grad():
            features, self.mask = stock.model.backbone(pixel_values, pixel_mask)[-1]
            self.position = stock.model.position_embedding(
                shape=features.shape, device=features.device, dtype=pixel_values.dtype, mask=self.mask
            )
            self.position = self.position.flatten(2).transpose(1, 2)
            self.memory = stock(pixel_values, pixel_mask=pixel_mask).encoder_last_hidden_state

    @property
    def own_queries(self) -> torch.Tensor:
        return self.weights["model.query_position_embeddings.weight"]

    def points(self, queries: torch.Tensor) -> torch.Tensor:
        """Reference points (N, 2) that this model's head makes of queries."""
        return self._perceptron("model.decoder.ref_point_head", queries).sigmoid()

    def __call__(self, queries: torch.Tensor, points: torch.Tensor | None = None) -> Predictions:
        points = self.points(queries) if points is None else points
        sine = sine_embedding(points, self.config.d_model // 2)
        hidden = queries.new_zeros(len(self.memory), *queries.shape)
        normed, self_maps, cross_maps = [], [], []
        for index in range(self.config.decoder_layers):
            name = f"model.decoder.layers.{index}"
            scale = self._perceptron("model.decoder.query_scale", hidden) if index else 1
            update, attention = self._self_attention(f"{name}.self_attn", hidden, queries)
            self_maps.append(attention)
            hidden = self._norm(f"{name}.self_attn_layer_norm", hidden + update)
            update, attention = self._cross_attention(
                f"{name}.encoder_attn", hidden, sine * scale, queries if index == 0 else None
            )
            cross_maps.append(attention)
            hidden = self._norm(f"{name}.encoder_attn_layer_norm", hidden + update)
            update = self._linear(f"{name}.mlp.fc2", self._linear(f"{name}.mlp.fc1", hidden).relu())
            hidden = self._norm(f"{name}.final_layer_norm", hidden + update)
            normed.append(self._norm("model.decoder.layernorm", hidden))
            if self.config.auxiliary_loss:  # such a checkpoint was trained with the norm feeding the next layer
                hidden = normed[-1]
        if self.config.auxiliary_loss:
            normed[-1] = self._norm("model.decoder.layernorm", hidden)
        states = torch.stack(normed)
        boxes = self._perceptron("bbox_predictor", states)
        boxes[..., :2] += (points / (1 - points)).log()
        return Predictions(self._linear("class_labels_classifier", states), boxes.sigmoid(), self_maps, cross_maps)

    def _linear(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, name: str, values: torch.Tensor) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _perceptron(self, name: str, values: torch.Tensor) -> torch.Tensor:
        layers = [key for key in self.weights if key.startswith(f"{name}.layers.") and key.endswith(".weight")]
        for index in range(len(layers)):
            values = self._linear(f"{name}.layers.{index}", values if index == 0 else values.relu())
        return values

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        """(B, N, d) to (B, M, N, d / M)."""
        return values.unflatten(-1, (self.config.decoder_attention_heads, -1)).transpose(1, 2)

    def _attend(self, name: str, query, key, value, allowed=None):
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None, None], -math.inf)
        attention = scores.softmax(-1)
        return self._linear(f"{name}.o_proj", (attention @ value).transpose(1, 2).flatten(2)), attention

    def _self_attention(self, name: str, hidden: torch.Tensor, queries: torch.Tensor):
        query, key = (
            self._linear(f"{name}.{side}_content_proj", hidden) + self._linear(f"{name}.{side}_pos_proj", queries)
            for side in "qk"
        )
        value = self._linear(f"{name}.v_proj", hidden)
        return self._attend(name, *(self._heads(values) for values in (query, key, value)))

    def _cross_attention(self, name: str, hidden, sine, queries):
        """In the first layer, where `queries` are given, positions are also added to the content parts."""
        query, key = (
            self._linear(f"{name}.q_content_proj", hidden),
            self._linear(f"{name}.k_content_proj", self.memory),
        )
        key_position = self._linear(f"{name}.k_pos_proj", self.position)
        if queries is not None:
            query, key = query + self._linear(f"{name}.q_pos_proj", queries), key + key_position
        sine = self._linear(f"{name}.q_pos_sine_proj", sine).expand_as(query)
        query = torch.cat([self._heads(query), self._heads(sine)], dim=-1)
        key = torch.cat([self._heads(key), self._heads(key_position)], dim=-1)
        value = self._heads(self._linear(f"{name}.v_proj", self.memory))
        return self._attend(name, query, key, value, self.mask.flatten(1))


def sine_embedding(points: torch.Tensor, features: int) -> torch.Tensor:
    """(N, 2) points, x and y in 0..1, to (N, 2 * features): y first, sine and cosine in turn."""
    powers = torch.tensor([10000 ** (2 * (i // 2) / features) for i in range(features)], dtype=points.dtype)
    angles = 2 * math.pi * points.flip(-1)[..., None] / powers
    even = torch.arange(features) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos()).flatten(-2)


def adaptive_pairs(teacher: Predictions, student: Predictions, weights, threshold: float) -> SimpleNamespace:
    """Minimum-cost pairs, `.teacher` and `.student` by layer and image, of the teacher's queries above a score."""
    sides: tuple[dict, dict] = ({}, {})
    for k in range(len(student.logits)):
        for b in range(student.logits.shape[1]):
            scores = [slow_reference.sigmoid(max(query)) for query in teacher.logits[k, b].tolist()]
            chosen = [i for i, score in enumerate(scores) if score > threshold]
            if len(chosen) > student.logits.shape[2]:  # those with the highest class score take part
                chosen.sort(key=lambda i: -scores[i])  # noqa: B023
                chosen = chosen[: student.logits.shape[2]]
            cost = slow_reference.cost_matrix(
                teacher.logits[k, b][chosen],
                teacher.boxes[k, b][chosen],
                student.logits[k, b],
                student.boxes[k, b],
                weights,
            )
            rows, columns = linear_sum_assignment(cost) if cost else ([], [])
            sides[0][k, b] = torch.tensor([chosen[row] for row in rows], dtype=torch.int64)
            sides[1][k, b] = torch.as_tensor(columns)
    return SimpleNamespace(teacher=sides[0], student=sides[1])


def fixed_pairs(teacher: Predictions) -> SimpleNamespace:
    """Query i with query i."""
    index = torch.arange(teacher.logits.shape[2]).expand(teacher.logits.shape[:3])
    return SimpleNamespace(teacher=index, student=index)


def object_assignment(predictions: Predictions, labels: list[dict], config) -> torch.Tensor:
    """(L, B, N): the object of each query by minimum cost, -1 for none."""
    assignment = torch.full(predictions.logits.shape[:3], -1)
    for k in range(len(predictions.logits)):
        for b, label in enumerate(labels):
            cost = []
            for scores, box in zip(predictions.logits[k, b].tolist(), predictions.boxes[k, b].tolist(), strict=True):
                row = []
                for kind, target in zip(label["class_labels"].tolist(), label["boxes"].tolist(), strict=True):
                    score, alpha = slow_reference.sigmoid(scores[kind]), 0.25  # in costs, whatever the loss has
                    as_object = -alpha * (1 - score) ** 2 * math.log(score)
                    as_background = -(1 - alpha) * score**2 * math.log(1 - score)
                    distance = sum(abs(p - t) for p, t in zip(box, target, strict=True))
                    row.append(
                        config.class_cost * (as_object - as_background)
                        + config.bbox_cost * distance
                        - config.giou_cost * slow_reference.scalar_giou(box, target)
                    )
                cost.append(row)
            if cost[0]:
                for query, held in zip(*linear_sum_assignment(cost), strict=True):
                    assignment[k, b, query] = held
    return assignment


@dataclass
class Settings:
    """Every option of the objective, by the method's symbols."""

    detection: float
    self_attention: float
    cross_attention: float
    prediction: float
    costs: tuple[float, float, float]  # class, L1, GIoU: of the adaptive matching and of the prediction loss
    layer_map: list[int]
    divergence: str = "kl"
    normaliser: str = "pairs"
    assignment: str = "teacher_last_layer"
    reduction: str = "sum"
    adaptive: bool = True
    threshold: float = 0.0  # of adaptive matching, for a teacher's query
    logits: float = 0.0  # Hungarian-matching logits distillation, with the weights of negatives and of each layer
    logits_negative: float = 1.0
    logits_layers: tuple[float, ...] = (1.0, 1.0, 1.0)


def terms(
    student: Predictions,
    auxiliary: Predictions | None,
    teacher: Predictions,
    masks: tuple[torch.Tensor, torch.Tensor],
    labels: list[dict],
    config,
    settings: Settings,
    classes: list[int],
    fixed: bool = True,
    further: dict[str, Predictions] | None = None,
    one_to_many: tuple[Predictions, int, float] | None = None,
) -> dict[str, list[float]]:
    """Every weighted term, "group/term", one number per layer of the student; their sum is the loss.

    Args:
        teacher: all of its layers.
        masks: memory masks (B, H, W) of teacher and student.
        config: the student's.
        classes: the teacher's class for each of the student's.
        fixed: whether the auxiliary group holds the teacher's queries.
        further: more groups by name, of learned queries.
        one_to_many: a group that is asked for every object so many times, how often, and its weight.
    """
    followed = teacher.of_layers(settings.layer_map, classes)
    groups = {"student": student} | ({} if auxiliary is None else {"auxiliary": auxiliary}) | (further or {})
    pairs = {"student": adaptive_pairs(followed, student, settings.costs, settings.threshold)}
    if not settings.adaptive:
        pairs = {}
    if auxiliary is not None and fixed:
        pairs["auxiliary"] = fixed_pairs(followed)
    found = {}
    boxes = max(1, sum(len(label["class_labels"]) for label in labels))
    detection = settings.detection / (len(groups) if settings.reduction == "mean" else 1)
    weights = {
        "class": detection * config.cls_loss_coefficient,
        "l1": detection * config.bbox_loss_coefficient,
        "giou": detection * config.giou_loss_coefficient,
    }
    for name, group in groups.items():
        assignment = object_assignment(group, labels, config)
        if name == "auxiliary" and fixed:
            last = object_assignment(teacher.of_layers([-1], classes), labels, config)[0]
            if settings.assignment == "teacher_last_layer":
                assignment[-1] = last
            elif settings.assignment == "teacher_last_layer_everywhere":
                assignment[:] = last
            elif settings.assignment == "teacher_per_layer":
                assignment = object_assignment(followed, labels, config)
        layers = [
            slow_reference.detection_loss(*layer, labels, held, boxes, config.focal_alpha)
            for *layer, held in zip(group.logits, group.boxes, assignment, strict=True)
        ]
        for term, weight in weights.items():
            found[f"{name}/{term}"] = [weight * layer[term] for layer in layers]
    if one_to_many is not None:
        group, times, weight = one_to_many
        copies = [{key: torch.cat([label[key]] * times) for key in ("class_labels", "boxes")} for label in labels]
        held = object_assignment(group, copies, config)
        layers = [
            slow_reference.detection_loss(*layer, copies, held[k], boxes * times, config.focal_alpha)
            for k, layer in enumerate(zip(group.logits, group.boxes, strict=True))
        ]
        for term in ("class", "l1", "giou"):
            factor = weight * settings.detection * weights[term] / detection
            found[f"one_to_many/{term}"] = [factor * layer[term] for layer in layers]
    for name, matched in pairs.items():
        group = groups[name]
        values = {
            "self_attention": slow_reference.self_attention_loss(
                followed.self_maps, group.self_maps, matched, settings.divergence
            ),
            "cross_attention": slow_reference.cross_attention_loss(
                followed.cross_maps, group.cross_maps, matched, *masks, settings.divergence
            ),
            "prediction": slow_reference.prediction_loss(
                (followed.logits, followed.boxes),
                (group.logits, group.boxes),
                matched,
                settings.normaliser,
                settings.costs,
            ),
        }
        for term, layers in values.items():
            found[f"{name}/{term}"] = [getattr(settings, term) * value for value in layers]
    if settings.logits > 0:
        layers = slow_reference.hungarian_logits_loss(
            (followed.logits, followed.boxes),
            (student.logits, student.boxes),
            pairs["student"],
            object_assignment(followed, labels, config),
            settings.logits_negative,
            settings.costs,
        )
        weighted = zip(settings.logits_layers, layers, strict=True)
        found["student/logits"] = [settings.logits * weight * value for weight, value in weighted]
    return found
