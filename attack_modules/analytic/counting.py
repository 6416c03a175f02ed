"""How many images an aggregate holds, and of which classes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attack_modules.attack import AttackError


def count_images(singular: Tensor, held: int, epochs: int) -> int:
    """Number of images: where the singular values (r,) of the first layer's update fall most steeply.

    Every class that somebody holds has an image, and the steepest fall is sought from there: the largest singular
    value, that of the images' mean, is far above all others. Where features drift much during the local steps, each
    image adds one direction an epoch: the steepest fall, down to the rounding of the weights, is at `epochs` times
    their number. That it is so shows where the images themselves end: just one is there for each class that is held,
    or one of the few other falls that stand out (the steepest twentieth before it).

    Args:
        singular: falling, positive.
        held: number of classes that somebody holds, as far as the last layer tells.
        epochs: steps in which each image takes part.
    """
    least = max(held, 1)
    if least >= len(singular):  # more images than units that were ever active: only their classes count them
        return least
    falls = singular[least - 1 : -1] / singular[least:]
    rank = least + int(falls.argmax())
    fewer = rank // epochs
    rounding = singular[rank] < 2 * singular[rank:].median()  # whose singular values are much alike
    if rounding and rank == fewer * epochs and least <= fewer < rank:
        before = falls[: rank - least]
        if fewer == held or before[fewer - least] >= before.quantile(0.95):
            return fewer
    return rank


def infer_labels(gradient: Tensor, num_images: int) -> Tensor:
    """(N,) labels in ascending order from the last layer's summed gradient (C, H).

    A class's deficit counts its images in units of a mean activation.
    """
    deficit, held = class_deficits(gradient)
    counts = held.long()
    quota = deficit * held * num_images / (deficit * held).sum()
    while counts.sum() < num_images:  # Sainte-Lague: the next image goes to the class with the largest quotient
        counts[(quota / (2 * counts + 1)).argmax()] += 1
    while counts.sum() > num_images:
        held_once = torch.where(counts > 0, quota, math.inf)
        counts[held_once.argmin()] -= 1
    return torch.arange(len(counts)).repeat_interleave(counts)


def class_deficits(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """How far each class's row sum of the last layer's gradient (C, H) lies below that of classes that nobody holds.

    Activations are not negative, so a row sums to `sum_m p_mc |h_m| - sum_{y_n = c} |h_n|`: classes that nobody holds
    give the positive part. They scatter as far below their median as above it. Without such classes there is no such
    yardstick, but a sum that is clearly negative is that of a class that somebody holds in any case.

    Returns:
        Deficits (C,), and whether somebody holds the class (C,).
    """
    sums = gradient.sum(1)
    empty = sums[sums > 0].median()
    deficit = (empty - sums).clamp_min(0)
    return deficit, (deficit > 2 * (sums.max() - empty)) | (sums < 0.01 * sums.min())


def common_labels(last: Sequence[Tensor], num_images: int) -> Tensor:
    """(N,) labels that every round's last layer (C, H) shows.

    Raises:
        AttackError: they differ.
    """
    labels = [infer_labels(layer, num_images) for layer in last]
    for number, others in enumerate(labels[1:], 2):
        if not torch.equal(labels[0], others):
            differing = int(
                (labels[0].bincount(minlength=len(last[0])) != others.bincount(minlength=len(last[0]))).sum()
            )
            raise AttackError(
                f"The observed rounds do not hold the same images: number {number} shows other counts than the first "
                f"in {differing} classes. Several rounds are read together only if the same peers train in each; name "
                "one in `federation.observed_rounds`, or use `AttributedInversion` (configs/attribution.yaml)."
            )
    return labels[0]
