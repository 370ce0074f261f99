"""Every loss and matching again, as slow loops over scalars written from the formulas, in float64."""

import importlib.util
import math
from itertools import permutations

import torch

from d3etr_hf.matching import TaughtGroup
from d3etr_hf.outputs import AttentionMap, GroupOutput


def with_bins_of(loss, model):
    """The loss with the model's own bins, which are its parameters, as its authors hand them over."""
    decoder = model.model.decoder
    loss.up, loss.reg_scale = decoder.up, decoder.reg_scale.detach()
    return loss


def scalar_giou(a, b):
    """Generalised IoU of two cxcywh boxes given as lists."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    intersection = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - intersection
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return intersection / union - (hull - union) / hull


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def soft_entropy(p, x):
    """BCE of the soft target p against the logit x."""
    q = sigmoid(x)
    return -(p * math.log(q) + (1 - p) * math.log(1 - q))


def pair_terms(teacher_logits, teacher_box, logits, box):
    """Class, L1 and GIoU of one teacher prediction and one student prediction (lists)."""
    classes = sum(soft_entropy(sigmoid(t), s) for t, s in zip(teacher_logits, logits, strict=True))
    l1 = sum(abs(t - s) for t, s in zip(teacher_box, box, strict=True))
    return classes, l1, scalar_giou(teacher_box, box)


def cost_matrix(teacher_logits, teacher_boxes, logits, boxes, weights=(1.0, 5.0, 2.0)):
    """Matching cost of one image and layer, as a list of rows (teacher) of columns (student)."""
    rows = []
    for t_logits, t_box in zip(teacher_logits.tolist(), teacher_boxes.tolist(), strict=True):
        row = []
        for s_logits, s_box in zip(logits.tolist(), boxes.tolist(), strict=True):
            classes, l1, giou = pair_terms(t_logits, t_box, s_logits, s_box)
            row.append(weights[0] * classes + weights[1] * l1 - weights[2] * giou)
        rows.append(row)
    return rows


def brute_force_cost(cost):
    """The smallest total cost of matching every row of the shorter side, by trying all."""
    if len(cost) > len(cost[0]):
        cost = [list(column) for column in zip(*cost, strict=True)]
    columns = range(len(cost[0]))
    return min(sum(cost[i][j] for i, j in enumerate(order)) for order in permutations(columns, len(cost)))


def prediction_loss(teacher, student, pairs, normaliser, weights=(1.0, 5.0, 2.0)):
    """Per layer; `teacher` and `student` are (logits (L,B,N,C), boxes (L,B,N,4))."""
    losses = []
    for k in range(len(teacher[0])):
        total, denominator = 0.0, 0.0
        for b in range(teacher[0].shape[1]):
            for i, j in zip(pairs.teacher[k, b].tolist(), pairs.student[k, b].tolist(), strict=True):
                t_logits = teacher[0][k, b, i].tolist()
                classes, l1, giou = pair_terms(
                    t_logits, teacher[1][k, b, i].tolist(), student[0][k, b, j].tolist(), student[1][k, b, j].tolist()
                )
                weight = 1.0 if normaliser == "pairs" else max(sigmoid(x) for x in t_logits)
                total += weight * (weights[0] * classes + weights[1] * l1 + weights[2] * (1 - giou))
                denominator += weight
        losses.append(total / denominator)
    return losses


def hungarian_logits_loss(teacher, student, pairs, assignment, negative_weight, weights=(1.0, 5.0, 2.0)):
    """DETRDistill per layer: positives per object and negatives, by their boxes alone, per pair of any kind.

    `teacher` and `student` are (logits (L,B,N,C), boxes (L,B,N,4)), `assignment` (L,B,N_t) with -1 for no object.
    """
    losses = []
    for k in range(len(teacher[0])):
        positives, negatives, objects, count = 0.0, 0.0, 0, 0
        for b in range(teacher[0].shape[1]):
            objects += int((assignment[k, b] >= 0).sum())
            for i, j in zip(pairs.teacher[k, b].tolist(), pairs.student[k, b].tolist(), strict=True):
                classes, l1, giou = pair_terms(
                    teacher[0][k, b, i].tolist(),
                    teacher[1][k, b, i].tolist(),
                    student[0][k, b, j].tolist(),
                    student[1][k, b, j].tolist(),
                )
                box = weights[1] * l1 + weights[2] * (1 - giou)
                count += 1
                if assignment[k, b, i] >= 0:
                    positives += weights[0] * classes + box
                else:
                    negatives += box
        losses.append(positives / objects + negative_weight * negatives / count)
    return losses


def shared_query_loss(teacher, student, weights=(1.0, 5.0, 2.0)):
    """KD-DETR per layer: sum of w_i (class KL + l1 + giou) over sum of w_i, and what their cross-entropy has besides.

    `teacher` and `student` are (logits (L,B,N,C), boxes (L,B,N,4)); query i is compared with query i.
    """
    losses, entropies = [], []
    for k in range(len(teacher[0])):
        total = denominator = own = 0.0
        for b in range(teacher[0].shape[1]):
            for i in range(teacher[0].shape[2]):
                p = [sigmoid(x) for x in teacher[0][k, b, i].tolist()]
                q = [sigmoid(x) for x in student[0][k, b, i].tolist()]
                t_box, s_box = teacher[1][k, b, i].tolist(), student[1][k, b, i].tolist()
                kl = sum(
                    t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s)) for t, s in zip(p, q, strict=True)
                )
                l1 = sum(abs(t - s) for t, s in zip(t_box, s_box, strict=True))
                giou = 1 - scalar_giou(t_box, s_box)
                total += max(p) * (weights[0] * kl + weights[1] * l1 + weights[2] * giou)
                own -= max(p) * weights[0] * sum(t * math.log(t) + (1 - t) * math.log(1 - t) for t in p)
                denominator += max(p)
        losses.append(total / denominator)
        entropies.append(own / denominator)
    return losses, entropies


def average_heads(teacher, student):
    """Both maps `(M, N, K)` averaged over heads where the head counts differ."""
    if len(teacher) != len(student):
        return teacher.mean(0, keepdim=True), student.mean(0, keepdim=True)
    return teacher, student


def row_divergence(teacher, student, divergence):
    """D of two distributions given as lists over the same keys."""
    if divergence == "kl":
        return sum(t * (math.log(t) - math.log(s)) for t, s in zip(teacher, student, strict=True) if t > 0)
    return sum((t - s) ** 2 for t, s in zip(teacher, student, strict=True)) / len(teacher)


def self_attention_loss(teacher, student, pairs, divergence):
    """Per layer; maps are probabilities, L tensors (B, M, N, N)."""
    losses = []
    for k in range(len(teacher)):
        values = []
        for b in range(teacher[k].shape[0]):
            t_heads, s_heads = average_heads(teacher[k][b], student[k][b])
            rows, columns = pairs.teacher[k, b].tolist(), pairs.student[k, b].tolist()
            for t_map, s_map in zip(t_heads.tolist(), s_heads.tolist(), strict=True):
                for i, j in zip(rows, columns, strict=True):
                    t_row, s_row = [t_map[i][c] for c in rows], [s_map[j][c] for c in columns]
                    t_row, s_row = [v / sum(t_row) for v in t_row], [v / sum(s_row) for v in s_row]
                    values.append(row_divergence(t_row, s_row, divergence))
        losses.append(sum(values) / len(values))
    return losses


def resampled_row(row, source, target):
    """One teacher row (list over H*W) on the student's grid; `source`, `target`: (H, W, rows, columns on the image).

    Every source token spreads its mass evenly over its area of the image; here by counting fine sample points.
    """
    (_, source_width, source_rows, source_columns), (height, width, rows, columns) = source, target
    result = [0.0] * (height * width)
    fine_y, fine_x = math.lcm(source_rows, rows), math.lcm(source_columns, columns)
    for y in range(fine_y):
        for x in range(fine_x):
            mass = row[(y * source_rows // fine_y) * source_width + x * source_columns // fine_x]
            mass /= (fine_y // source_rows) * (fine_x // source_columns)
            result[(y * rows // fine_y) * width + x * columns // fine_x] += mass
    return result


def cross_attention_loss(teacher, student, pairs, teacher_mask, student_mask, divergence):
    """Per layer; maps are probabilities, L tensors (B, M, N, H*W); masks (B, H, W)."""
    losses = []
    for k in range(len(teacher)):
        values = []
        for b in range(teacher[k].shape[0]):
            grids = []
            for mask in (teacher_mask[b], student_mask[b]):
                grids.append((*mask.shape, int(mask[:, 0].sum()), int(mask[0].sum())))
            valid = [v for v, keep in enumerate(student_mask[b].flatten().tolist()) if keep]
            t_heads, s_heads = average_heads(teacher[k][b], student[k][b])
            for t_map, s_map in zip(t_heads.tolist(), s_heads.tolist(), strict=True):
                for i, j in zip(pairs.teacher[k, b].tolist(), pairs.student[k, b].tolist(), strict=True):
                    row = t_map[i] if grids[0][:2] == grids[1][:2] else resampled_row(t_map[i], *grids)
                    t_row, s_row = [row[v] for v in valid], [s_map[j][v] for v in valid]
                    values.append(row_divergence(t_row, s_row, divergence))
        losses.append(sum(values) / len(values))
    return losses


def detection_loss(logits, boxes, labels, assignment, num_boxes, alpha=0.25, gamma=2.0):
    """Class, L1 and GIoU loss of one layer, the original criterion: logits (B,N,C), assignment (B,N) with -1."""
    classes = l1 = giou = 0.0
    for b, label in enumerate(labels):
        for q in range(logits.shape[1]):
            held = int(assignment[b, q])
            for c in range(logits.shape[2]):
                target = 1.0 if held >= 0 and int(label["class_labels"][held]) == c else 0.0
                score = sigmoid(logits[b, q, c].item())
                right = score if target else 1 - score
                classes += (alpha if target else 1 - alpha) * (1 - right) ** gamma * -math.log(right)
            if held >= 0:
                box, target_box = boxes[b, q].tolist(), label["boxes"][held].tolist()
                l1 += sum(abs(p - t) for p, t in zip(box, target_box, strict=True))
                giou += 1 - scalar_giou(box, target_box)
    return {"class": classes / num_boxes, "l1": l1 / num_boxes, "giou": giou / num_boxes}


def cross_entropy_loss(logits, labels, assignment, no_object_weight):
    """DETR's class loss of one layer: logits (B,N,C+1), assignment (B,N) with -1; a mean weighted by class."""
    total = weights = 0.0
    for b, label in enumerate(labels):
        for q in range(logits.shape[1]):
            held, row = int(assignment[b, q]), logits[b, q].tolist()
            target = int(label["class_labels"][held]) if held >= 0 else len(row) - 1
            weight = 1.0 if held >= 0 else no_object_weight
            total += weight * (math.log(sum(math.exp(x) for x in row)) - row[target])
            weights += weight
    return total / weights


def random_group(layers, batch, queries, classes, heads, mask, seed):
    """Random predictions and maps in float64 as a `GroupOutput` that wants a gradient; `mask` (B, H, W)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    padding = ~mask.flatten(1)[:, None, None]
    tokens = mask[0].numel()
    leaves = {
        "logits": normal(layers, batch, queries, classes).requires_grad_(),
        "boxes": (normal(layers, batch, queries, 4).sigmoid() * 0.6 + 0.1).requires_grad_(),
        "self": [normal(batch, heads, queries, queries).requires_grad_() for _ in range(layers)],
        "cross": [normal(batch, heads, queries, tokens).requires_grad_() for _ in range(layers)],
    }

    def attention(scores):
        log = scores.log_softmax(-1)
        return AttentionMap(log, log.exp())

    lowest = torch.finfo(torch.float64).min
    return GroupOutput(
        logits=leaves["logits"],
        boxes=leaves["boxes"],
        self_attention=tuple(attention(scores) for scores in leaves["self"]),
        cross_attention=tuple(attention(scores.masked_fill(padding, lowest)) for scores in leaves["cross"]),
    )


def taught(group, classes=slice(None)):
    """A group whose logits are read by sigmoid as a teacher's outputs; what wants a gradient goes on wanting it."""
    return TaughtGroup(
        probabilities=group.logits.sigmoid()[..., classes],
        boxes=group.boxes,
        self_attention=group.self_attention,
        cross_attention=group.cross_attention,
    )


def public_loop_of(shared_data):
    """The slow public implementation, which lies beside the real images."""
    spec = importlib.util.spec_from_file_location("public_loop", shared_data.parent / "reference" / "public_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
