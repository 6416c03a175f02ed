"""How many images an aggregate holds, and of which classes: for every attack."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attack_modules.analytic.noise_floor import noise_floor
from attack_modules.analytic.results import ImageCount, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace
from attack_modules.analytic.typical_head import TypicalHead
from attack_modules.attack import AttackError

CHANCE = 4.5
"""Standard deviations of the scatter of empty classes beyond which a class is held: one in 300,000 by chance."""
LEAST_SHARE = 0.03
"""Share of all images from which a class counts as held, where few classes are empty."""
CLEAR_FALL = 1.5
"""Fall of the singular values over two steps that is no chance. Measured: at most 1.4 beyond the last image under noise
or quantisation, 1.9 or more at the last image otherwise."""
COMPRESSED_FALL = 3.0
"""The same where entries were pruned or quantised, which adds directions of its own. Measured: at most 1.8 by these."""
SLIGHT_FALL = 1.2
"""Fall over two steps at N that supports an edge of the rounding at the local epochs times N."""
STEEP_FALL = 30.0
"""Fall from an image to the rounding of the weights."""
ALIKE = 0.1
"""Scatter over the median up to which rows of classes are in the proportion of their predictions, as those of empty
classes are. Measured: 0.01 to 0.03 under clipping, noise included, 0.3 and more of classes with images."""
MOST_OF_RANK = 0.97
"""Singular values beyond this share of the rank are not searched."""
SIZE_WIDTH = 0.01
"""Relative to the median, width within which entries are of one size."""
ROUNDING = 8
"""Spacings of the weights up to which an entry may be rounding: that of two models, and of the subtracted update."""
LEAST_ACTIVE = 0.01
"""Size over the largest from which a unit or feature is active in any case."""
ROUNDED = 64
"""Median entry of an update, in spacings of its weights, below which their rounding leaves few sizes."""
MOST_OF_COMPRESSED = 0.85
"""The same under pruning and quantisation, which end in a fall."""


def read_counts(
    first: RowSpace, last: Sequence[Tensor], hidden: int, training: TrainingKnowledge
) -> tuple[ImageCount, Tensor]:
    """Number of images and their labels, as far as they are not known already.

    Args:
        first: the update of the head's first layer, of one round.
        last: of each round, (C, H) update of the last layer, (C, H + 1) with a bias.
        hidden: H, the number of the last layer's inputs without the bias.
        training: how the peers trained, and what is known of their images.

    Returns:
        The count, and (N,) long labels, ascending unless they were told.

    Raises:
        AttackError: the number of images cannot be read, or rounds do not hold the same classes.
    """
    gradients = [layer / (training.lr * training.steps) for layer in last]
    typical, smoothing, weights = training.typical, training.loss.label_smoothing, training.loss.weights(last[0])
    if weights is not None:  # an image then counts the same in the row of its own class, whatever that is
        gradients = [gradient / weights[:, None] for gradient in gradients]
        typical = typical and replace(typical, probabilities=typical.probabilities / weights)
    held, distinct = held_classes(gradients[0], hidden, typical, smoothing)
    noise, above = noise_floor(first.singular, tuple(first.update.shape)) or (None, 1)
    compressed = is_compressed(active_entries(first.update, first.spacing), first.spacing)
    epochs = training.epochs or training.steps

    def counted(held: Tensor, distinct: bool) -> tuple[int, bool, bool]:
        return count_images(first.singular, int(held.sum()), epochs, distinct, above, compressed)

    found, clear, views = counted(held, distinct)
    # with one evident class, the fall behind it would be that of the images' mean
    if not distinct and 1 < (evident := class_evidence(gradients[0])[1]).sum() < len(evident) / 2:
        fewer = counted(evident, True)
        steep = first.singular[fewer[0] - 1] > STEEP_FALL * first.singular[min(fewer[0], len(first.singular) - 1)]
        scales = [empty_scale(gradient, hidden, evident, typical) for gradient in gradients]
        if fewer[0] < held.sum() and (steep or scales[0]):  # so many classes have no images: a scale as of clipping
            held, distinct, (found, clear, views) = evident, True, fewer
            gradients = [gradient / (scale or 1) for gradient, scale in zip(gradients, scales, strict=True)]
    num_held = int(held.sum())
    told = training.num_images or (None if training.labels is None else len(training.labels))
    num_images = told or found
    if told is None:
        classes, single = len(last[0]), first.update.shape == last[0].shape
        if single and (not distinct or num_images >= classes - 1):
            raise AttackError(
                f"The number of images cannot be read from a head of one layer with {classes} outputs: {num_held} of "
                "its classes have images, and images of one class look like one. Give a guess as "
                "`knowledge.num_images`."
            )
    labels = training.labels
    if labels is None:
        labels = common_labels(gradients, num_images, hidden, typical, smoothing)
    count = ImageCount(
        num_images=num_images,
        held=num_held,
        counted=clear or told is not None,
        views=views and told is None,
        noise=noise,
        compressed=compressed,
        shown=found if clear else num_held,
    )
    return count, labels


def held_classes(
    gradient: Tensor, hidden: int, typical: TypicalHead | None, smoothing: float = 0.0
) -> tuple[Tensor, bool]:
    """Which classes have images, and whether most classes have none.

    Where most classes are empty, see `class_evidence`; else, shares of the images are estimated (`TypicalHead`).

    Args:
        gradient: (C, H), (C, H + 1) with a bias: the last layer's mean gradient.
        hidden: H.
        typical: of the model before the round; None where the model is not at hand.
        smoothing: of the labels.

    Returns:
        (C,) bool, and a bool.
    """
    held = class_evidence(gradient)[1]
    if typical is not None:
        common = class_shares(gradient, hidden, typical, smoothing) > LEAST_SHARE
        if common.sum() >= len(common) / 2:
            return held | common, False
    return held, True


def empty_scale(gradient: Tensor, hidden: int, held: Tensor, typical: TypicalHead) -> float | None:
    """Scale of a gradient, 1 if it is as it was taken to be, as classes without images show it; None if they do not.

    Without images, class c's row is `p_c` times one vector that all classes share.

    Args:
        gradient: (C, H), (C, H + 1) with a bias: the last layer's mean gradient, up to its scale.
        hidden: H.
        held: (C,) bool, classes that have images in any case.
        typical: of the model before the round.
    """
    rows = gradient[~held] / typical.probabilities[~held, None].to(gradient)
    along = rows @ rows.mean(0)
    scatter = 1.4826 * (along - along.median()).abs().median()
    scale = (rows[:, -1] if gradient.shape[1] > hidden else rows.sum(1) / typical.inputs).median().item()
    return scale if len(rows) > 2 and scatter < ALIKE * along.median() and scale > 0 else None


def count_images(
    singular: Tensor,
    held: int,
    epochs: int,
    distinct: bool = True,
    at_least: int = 1,
    compressed: bool = False,
) -> tuple[int, bool, bool]:
    """Number of images from the singular values of the first layer's update.

    The update of N images has rank N, so the singular values fall after the N-th, over one or two steps. The search
    starts at the number of classes that any peer holds, since each has an image; the largest singular value, that of
    the images' mean, is far above all others. Where features drift during the local steps, each image adds one
    direction an epoch, and the singular values fall to the rounding of the weights at `epochs` times N only. This case
    is recognised by a second fall at N. Where nothing falls, as under noise, pruning and quantisation, the number of
    held classes is the best lower bound.

    Args:
        singular: (r,) falling, positive.
        held: number of classes that any peer holds, as far as the last layer tells.
        epochs: steps in which each image takes part.
        distinct: whether most classes have no image. If not, images surely share classes, and a fall at `held` must
            reach the rounding of the weights.
        at_least: another lower bound.
        compressed: whether entries were pruned or quantised.

    Returns:
        N, whether the singular values fall there, and whether they count the views of augmented images.
    """
    most = int((MOST_OF_COMPRESSED if compressed else MOST_OF_RANK) * len(singular))
    clear_fall = COMPRESSED_FALL if compressed else CLEAR_FALL
    least = max(held, at_least, 1)
    one, two = (torch.cat([singular[:-k] / singular[k:], torch.ones(k)]) for k in (1, 2))  # entry i: fall at i + 1

    def begins_later(n: int) -> bool:
        """Whether nearly all of the fall at n is in the second of the two steps."""
        return n < most and one[n - 1] < min(one[n].item(), max(2.0, one[n].sqrt().item()))

    start = least
    if not distinct and least < most and one[least - 1] < STEEP_FALL:
        start += 1
    if start >= most:
        return least, False, False
    views = False
    rounding = [n for n in range(start, most + 1) if singular[n] < 3 * singular[n:].median()]
    if epochs > 1 and rounding:
        edge = max(rounding, key=lambda n: one[n - 1].item())
        fewer = edge // epochs
        multiple = edge == fewer * epochs and start <= fewer < edge and not (fewer > held and begins_later(fewer))
        if multiple and two[edge - 1] > clear_fall:
            before = two[start - 1 : max(edge - 2 * epochs, fewer)]  # the edge itself may extend over some values
            fall = two[fewer - 1]
            if (fall > clear_fall and (fewer == held or fall >= before.quantile(0.95))) or (
                fall > SLIGHT_FALL and fall >= before.max()
            ):
                return fewer, True, False
            views = distinct and fewer == held
    rank = start + int(two[start - 1 : most].argmax())
    before_end = int(MOST_OF_COMPRESSED * len(singular))
    if rank > before_end > start:  # as rounding ends, too: 8 bits are not seen to be compressed
        earlier = start + int(two[start - 1 : before_end].argmax())
        rank = earlier if two[earlier - 1] > COMPRESSED_FALL else rank
    if rank != held and begins_later(rank):
        rank += 1
    if two[rank - 1] <= clear_fall:
        return least, False, False
    return rank, True, views and rank == edge


def counts_to_try(singular: Tensor, count: ImageCount, training: TrainingKnowledge) -> list[int]:
    """Numbers of images between which the reading of them has to decide, the likeliest first.

    Features of images that are alike drift alike during the local steps. Their common drift is one more direction,
    which stands above the rest of the drift as the images' mean does above the images, and would count as an image.

    Args:
        singular: (r,) falling, positive, of the first layer's update.
        count: as it was read.
        training: how the peers trained, and what is known of their images.
    """
    number = count.num_images
    told = training.num_images is not None or training.labels is not None
    if told or not count.counted or training.steps == 1 or number - 1 <= count.held:
        return [number]
    falls = (singular[number - 2] / singular[number - 1]).item() > SLIGHT_FALL
    return [number, number - 1] if falls else [number]


def active_entries(update: Tensor, spacing: float, most: int = 10**6) -> Tensor:
    """(R, K) entries of an update in evenly spaced rows and columns, without those of inactive units and features.

    Args:
        update: (H, D).
        spacing: of floating-point numbers as large as the weights, see `float_spacing`: where the update is 0, rounding
            leaves a few of these.
        most: number of entries.
    """
    sizes = [torch.maximum(update.amax(dim), -update.amin(dim)) for dim in (1, 0)]
    least = min(ROUNDING * spacing, LEAST_ACTIVE * sizes[0].max().item())
    rows, columns = (torch.where(size > least)[0] for size in sizes)
    rows = rows[:: max(math.ceil(len(rows) / most**0.5), 1)]
    columns = columns[:: max(math.ceil(len(columns) * len(rows) / most), 1)]
    return update[rows[:, None], columns].double()


def is_compressed(entries: Tensor, spacing: float = 0.0, zeros: float = 0.2, values: int = 32) -> bool:
    """Whether entries of an update were pruned or quantised: many are 0, or most have one of few sizes.

    Where an update is small beside its weights, their rounding leaves zeros and few sizes as well.

    Args:
        entries: as of `active_entries`.
        spacing: of floating-point numbers as large as the weights.
        zeros: share of zeros from which it counts as compressed. Measured: at most 0.07 by the rounding of the weights,
            0.10 at 8 bits, which changes little, 0.35 at 4 bits, 0.43 where 10 % of the entries are kept.
        values: number of sizes that count as few: the mean of the signs of five clients has 32 at most.
    """
    entries = entries.flatten().abs()
    some = entries[entries != 0]
    steps = some.median().item() / spacing if spacing and len(some) else math.inf
    if 1 - len(some) / len(entries) > zeros + 1 / steps:
        return True
    if steps < ROUNDED:
        return False
    sizes = (entries / entries.median() / SIZE_WIDTH).round().clamp_max(10 / SIZE_WIDTH).long().bincount()
    return bool(sizes.sort(descending=True).values[:values].sum() > 0.8 * len(entries))


def infer_labels(
    gradient: Tensor, num_images: int, hidden: int, typical: TypicalHead | None = None, smoothing: float = 0.0
) -> Tensor:
    """(N,) labels in ascending order from the last layer's mean gradient.

    Where most classes are without images, the evidence of a class grows with the number of its images
    (`class_evidence`); otherwise the shares are estimated (`class_shares`).

    Args:
        gradient: (C, H), (C, H + 1) with a bias. Its scale matters only with `typical`.
        num_images: N.
        hidden: H.
        typical: of the model before the round; None where the model is not at hand.
        smoothing: of the labels.
    """
    if typical is None or num_images < len(gradient) / 2:
        evidence, held = class_evidence(gradient)
        evidence = evidence.clamp_min(0)
        weight = torch.where(held, evidence, 0.0)
        quota, least = weight * num_images / weight.sum() if held.any() else evidence, held.long()
    else:
        quota = class_shares(gradient, hidden, typical, smoothing) * num_images
        least = torch.zeros(len(quota), dtype=torch.long)
    return torch.arange(len(quota)).repeat_interleave(apportion(quota, least, num_images))


def apportion(quota: Tensor, least: Tensor, total: int) -> Tensor:
    """(C,) long counts that sum to `total`: each step goes to the class whose count is furthest below its quota.

    Args:
        quota: (C,) expected counts.
        least: (C,) long counts to start from; where they exceed `total`, the smallest quotas lose theirs.
        total: N.
    """
    counts = least.clone()
    while counts.sum() < total:
        counts[(quota - counts).argmax()] += 1
    while counts.sum() > total:
        counts[torch.where(counts > 0, quota, math.inf).argmin()] -= 1
    return counts


def class_shares(gradient: Tensor, hidden: int, typical: TypicalHead, smoothing: float = 0.0) -> Tensor:
    """(C,) share of the images that each class has, which sum to about 1; scattered around the truth.

    Class c's row of the gradient sums to about `s (p_c - m_c / N)`: `m_c` the number of its images, `p_c` its mean
    predicted probability, `s` the mean sum of the layer's inputs. A bias has `s = 1` exactly. Smoothed labels give
    every class a share of `smoothing / C`.
    """
    biased = gradient.shape[1] > hidden
    rows = gradient[:, -1] if biased else gradient.sum(1) / typical.inputs
    labelled = typical.probabilities.to(rows) - rows  # with weights of classes, these sum to another number than 1
    labelled = labelled / labelled.sum()
    return (labelled - smoothing / len(labelled)) / (1 - smoothing)


def class_evidence(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """How far each class's row of the last layer's gradient lies on the side of classes with images.

    Activations are not negative, so along their leading direction v, which is the matched filter for them in noise, a
    row is `sum_m p_mc v.h_m - sum_{y_n = c} v.h_n`; classes without images have the positive part only. A class is held
    if its row is clearly negative, or clearly below the rows of most classes.

    Args:
        gradient: (C, H), of any positive scale.

    Returns:
        Evidence (C,), and whether any peer holds the class (C,).
    """
    if len(gradient) < gradient.shape[1]:
        direction = gradient.T @ torch.linalg.eigh(gradient @ gradient.T).eigenvectors[:, -1]
        direction = direction / direction.norm()
    else:
        direction = torch.linalg.eigh(gradient.T @ gradient).eigenvectors[:, -1]
    along = -gradient @ direction * (1 if direction.sum() > 0 else -1)
    evidence = along - along.median()
    scatter = 1.4826 * evidence.abs().median()
    negative = (along > CHANCE * scatter) & (along > 0.01 * along.max())
    below = (evidence > CHANCE * scatter) & (evidence > 0.2 * evidence.max())
    return evidence, negative | below


def common_labels(
    gradients: Sequence[Tensor],
    num_images: int,
    hidden: int,
    typical: TypicalHead | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """(N,) labels that every round's last layer shows, see `infer_labels`.

    Raises:
        AttackError: they differ.
    """
    labels = [infer_labels(gradient, num_images, hidden, typical, smoothing) for gradient in gradients]
    for number, others in enumerate(labels[1:], 2):
        if not torch.equal(labels[0], others):
            classes = len(gradients[0])
            differing = int((labels[0].bincount(minlength=classes) != others.bincount(minlength=classes)).sum())
            raise AttackError(
                f"The observed rounds do not hold the same images: number {number} has other label counts than the "
                f"first in {differing} classes. Rounds are read together only if the same peers train in each; name "
                "one in `federation.observed_rounds`, or set `model.rounds: ChangingParticipants` "
                "(configs/attribution.yaml)."
            )
    return labels[0]
