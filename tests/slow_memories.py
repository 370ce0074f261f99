"""Every loss that compares memories again, as slow loops over scalars from the papers' formulas, in float64."""

import math

import torch

from d3etr_hf.outputs import ComparedLevel


def random_levels(widths=(5, 5), sizes=((4, 6), (2, 3)), batch=3, seed=0):
    """Levels of two memories in float64, the student's wanting a gradient; images 1 and 2 are padded."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for height, width in sizes:
        mask = torch.ones(batch, height, width, dtype=torch.bool)
        mask[1, -1:], mask[2, :, -1:] = False, False
        ours, theirs = (
            torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
            for channels in widths
        )
        levels.append(ComparedLevel(ours.requires_grad_(), theirs, mask))
    return tuple(levels)


def tokens_of(level, image):
    """Of one image the features `(d,)` of student and teacher as lists, by row and column, without padding."""
    places = [tuple(place) for place in level.mask[image].nonzero().tolist()]
    return {
        (row, column): (level.student[image, :, row, column].tolist(), level.teacher[image, :, row, column].tolist())
        for row, column in places
    }


def fitnet_loss(levels):
    """Per level; the mean over images of the mean over tokens and channels."""
    losses = []
    for level in levels:
        images = []
        for image in range(len(level.mask)):
            squares = [
                (s - t) ** 2
                for ours, theirs in tokens_of(level, image).values()
                for s, t in zip(ours, theirs, strict=True)
            ]
            images.append(sum(squares) / len(squares))
        losses.append(sum(images) / len(images))
    return losses


def resampled_features(features, source, target):
    """One image's map `(d, H, W)` on another grid; `source`, `target`: rows and columns on the image of each.

    Every cell of the target is the mean of fine sample points, each of which lies in one cell of the source.
    """
    fine_y, fine_x = math.lcm(source[0], target[0]), math.lcm(source[1], target[1])
    result = torch.zeros(len(features), *target, dtype=features.dtype)
    for y in range(fine_y):
        for x in range(fine_x):
            value = features[:, y * source[0] // fine_y, x * source[1] // fine_x]
            result[:, y * target[0] // fine_y, x * target[1] // fine_x] += value
    return result / ((fine_y // target[0]) * (fine_x // target[1]))


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def squared(ours, theirs):
    """The mean over channels of the squared difference of two lists."""
    return mean((s - t) ** 2 for s, t in zip(ours, theirs, strict=True))


def cells_of(targets, level, image):
    """Of each object the places of the image whose cells share an area with its box."""
    rows, columns = int(level.mask[image, :, 0].sum()), int(level.mask[image, 0].sum())
    found = []
    for x, y, width, height in targets.boxes[image, : targets.counts[image]].tolist():
        cells = []
        for row in range(rows):
            for column in range(columns):
                shared_x = min((column + 1) / columns, x + width / 2) - max(column / columns, x - width / 2)
                shared_y = min((row + 1) / rows, y + height / 2) - max(row / rows, y - height / 2)
                if shared_x > 0 and shared_y > 0:
                    cells.append((row, column))
        found.append(cells)
    return found


def attentions_of(features, temperature):
    """Of features by place: attention to places, and to channels."""
    places, count = list(features), len(features)
    channels = len(features[places[0]])
    by_place = {place: math.exp(mean(map(abs, features[place])) / temperature) for place in places}
    by_channel = [
        math.exp(mean(abs(features[place][channel]) for place in places) / temperature) for channel in range(channels)
    ]
    return (
        {place: count * value / sum(by_place.values()) for place, value in by_place.items()},
        [channels * value / sum(by_channel) for value in by_channel],
    )


def fgd_loss(levels, targets, temperature=0.5, background_weight=0.5):
    """Per level; foreground is a mean over all objects, everything else over images."""
    losses = []
    for level in levels:
        foreground = others = 0.0
        for image in range(len(level.mask)):
            tokens, objects = tokens_of(level, image), cells_of(targets, level, image)
            ours, theirs = ({place: pair[side] for place, pair in tokens.items()} for side in (0, 1))
            (our_places, our_channels), (places, channels) = (attentions_of(f, temperature) for f in (ours, theirs))
            weighted = {
                place: places[place]
                * mean(a * (s - t) ** 2 for a, s, t in zip(channels, ours[place], theirs[place], strict=True))
                for place in tokens
            }
            held = {place: min(len(cells) for cells in objects if place in cells) for place in set().union(*objects)}
            foreground += sum(weighted[place] / size for place, size in held.items())
            others += background_weight * mean(value for place, value in weighted.items() if place not in held)
            others += mean(abs(places[place] - our_places[place]) for place in tokens)
            others += mean(abs(t - s) for s, t in zip(our_channels, channels, strict=True))
            contexts = level.student_context[image].tolist(), level.teacher_context[image].tolist()
            others += mean(
                squared(*([f + c for f, c in zip(*pair, strict=True)] for pair in zip(both, contexts, strict=True)))
                for both in tokens.values()
            )
        losses.append(foreground / max(1, sum(targets.counts)) + others / len(level.mask))
    return losses


def defeat_loss(levels, targets):
    """Per level; half the mean over foreground and half the mean over background, of each image."""
    losses = []
    for level in levels:
        images = []
        for image in range(len(level.mask)):
            held = set().union(*cells_of(targets, level, image))
            apart = {True: [], False: []}
            for place, pair in tokens_of(level, image).items():
                apart[place in held].append(squared(*pair))
            images.append(mean(apart[True]) / 2 + mean(apart[False]) / 2)
        losses.append(mean(images))
    return losses


def clockdistill_loss(levels, targets, alpha=5e-5, beta=1e-7):
    """Per level; alpha sum M S d^2 over all objects and beta sum (1 - M) S d^2 over images, d^2 a mean, over alpha."""
    losses = []
    for level in levels:
        of_objects = of_background = 0.0
        for image in range(len(level.mask)):
            tokens, objects = tokens_of(level, image), cells_of(targets, level, image)
            outside = [place for place in tokens if not any(place in cells for cells in objects)]
            for place, pair in tokens.items():
                sizes = [len(cells) for cells in objects if place in cells]
                if sizes:
                    of_objects += alpha / min(sizes) * squared(*pair)
                else:
                    of_background += beta / len(outside) * squared(*pair)
        losses.append((of_objects / max(1, sum(targets.counts)) + of_background / len(level.mask)) / alpha)
    return losses


def cosine(a, b):
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def detrdistill_loss(levels, queries, quality):
    """Per level; `queries` (B, N, d), `quality` (B, N)."""
    losses = []
    for level in levels:
        images = []
        for image in range(len(level.mask)):
            tokens = tokens_of(level, image)
            likeness = {
                place: sum(q * cosine(query, theirs) for q, query in zip(*each, strict=True))
                for each in [(quality[image].tolist(), queries[image].tolist())]
                for place, (_, theirs) in tokens.items()
            }
            highest = max(likeness.values())
            weights = {place: max(0.01, value / highest if highest > 0 else 0.0) for place, value in likeness.items()}
            images.append(mean(weights[place] ** 2 * squared(*pair) for place, pair in tokens.items()))
        losses.append(mean(images))
    return losses


def vidt_loss(levels, teacher_queries, student_queries):
    """Per level; of tokens and of queries the mean distance over the root of the width."""

    def distance(ours, theirs):
        return math.sqrt(squared(ours, theirs))

    losses = []
    for level in levels:
        images = []
        for image in range(len(level.mask)):
            of_tokens = mean(distance(*pair) for pair in tokens_of(level, image).values())
            pairs = zip(student_queries[image].tolist(), teacher_queries[image].tolist(), strict=True)
            images.append(of_tokens + mean(distance(*pair) for pair in pairs))
        losses.append(mean(images))
    return losses
