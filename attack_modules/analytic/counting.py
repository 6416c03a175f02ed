"""How many images an aggregate holds, and of which classes: for every attack."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attack_modules.analytic.results import TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace
from attack_modules.analytic.typical_head import TypicalHead
from attack_modules.attack import AttackError


def read_counts(
    first: RowSpace, last: Sequence[Tensor], hidden: int, training: TrainingKnowledge
) -> tuple[int, Tensor]:
    """Number of images and their labels, as far as they are not known already.

    Args:
        first: the update of the head's first layer, of one round.
        last: of each round, (C, H) update of the last layer, (C, H + 1) with a bias.
        hidden: H, the number of the last layer's inputs without the bias.
        training: how the peers trained, and what is known of their images.

    Returns:
        N, and (N,) long labels, ascending unless they were known.

    Raises:
        AttackError: the number of images cannot be read, or rounds do not hold the same classes.
    """
    given = None if training.labels is None else len(training.labels)
    num_images = training.num_images or given
    if num_images is None:
        held = int(class_deficits(last[0])[1].sum())
        num_images = count_images(first.singular, held, training.epochs or training.steps)
        narrow = min(first.update.shape)
        if num_images > held and num_images >= narrow - 1:  # a softmax gradient's rows sum to zero
            raise AttackError(
                f"The number of images cannot be read from a head layer of {narrow} outputs whose update has full "
                "rank. Give a guess as `knowledge.num_images`."
            )
    if training.labels is not None:
        return num_images, training.labels
    mean_gradients = [layer / (training.lr * training.steps) for layer in last]
    return num_images, common_labels(mean_gradients, num_images, hidden, training.typical)


def count_images(singular: Tensor, held: int, epochs: int) -> int:
    """Number of images from the singular values of the first layer's update.

    The update of N images has rank N, so the singular values fall steeply after the N-th. The search starts at the
    number of classes that any peer holds, since each has an image; the largest singular value, that of the images'
    mean, is far above all others. Where features drift much during the local steps, each image adds one direction an
    epoch, and the steepest fall, down to the rounding of the weights, is at `epochs` times N. This case is recognised
    by a second fall at N: N is the number of held classes, or one of the steepest twentieth of the falls before.

    Args:
        singular: (r,) falling, positive.
        held: number of classes that any peer holds, as far as the last layer tells.
        epochs: steps in which each image takes part.
    """
    least = max(held, 1)
    if least >= len(singular):  # more images than units that were ever active: only their classes count them
        return least
    falls = singular[least - 1 : -1] / singular[least:]
    rank = least + int(falls.argmax())
    fewer = rank // epochs
    rounding = singular[rank] < 2 * singular[rank:].median()  # rounding noise has nearly equal singular values
    if rounding and rank == fewer * epochs and least <= fewer < rank:
        before = falls[: rank - least]
        if fewer == held or before[fewer - least] >= before.quantile(0.95):
            return fewer
    return rank


def infer_labels(
    gradient: Tensor, num_images: int, hidden: int | None = None, typical: TypicalHead | None = None
) -> Tensor:
    """(N,) labels in ascending order from the last layer's mean gradient.

    Class c's row of the gradient sums to about `s (p_c - m_c / N)`: `m_c` the number of its images, `p_c` its mean
    predicted probability, `s` the mean sum of the layer's inputs. A bias has `s = 1` exactly. Where most classes are
    without images, their rows give `s p_c` (see `class_deficits`); otherwise both are estimated (`TypicalHead`).

    Args:
        gradient: (C, H), (C, H + 1) with a bias. Its scale matters only with `typical`.
        num_images: N.
        hidden: H; None if there is no bias.
        typical: of the model before the round; None where the model is not at hand.
    """
    rows, size = (gradient.sum(1), None) if hidden in (None, gradient.shape[1]) else (gradient[:, -1], 1.0)
    if typical is None or num_images < len(rows) / 2:
        deficit, held = class_deficits(gradient)
        quota, least = deficit * held * num_images / (deficit * held).sum(), held.long()
    else:
        share = typical.probabilities.to(rows) - rows / (size or typical.inputs)
        quota, least = share * num_images, torch.zeros(len(rows), dtype=torch.long)
    return torch.arange(len(rows)).repeat_interleave(apportion(quota, least, num_images))


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


def class_deficits(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """How far each class's row sum of the last layer's gradient lies below that of classes without images.

    Activations are not negative, so a row sums to `sum_m p_mc |h_m| - sum_{y_n = c} |h_n|`; classes without images
    have the positive part only, and scatter around their median. A sum that is clearly negative is that of a held class
    in any case, also where no class is without images.

    Args:
        gradient: (C, H), of any positive scale.

    Returns:
        Deficits (C,), and whether any peer holds the class (C,).
    """
    sums = gradient.sum(1)
    empty = sums[sums > 0].median()
    deficit = (empty - sums).clamp_min(0)
    return deficit, (deficit > 2 * (sums.max() - empty)) | (sums < 0.01 * sums.min())


def common_labels(
    gradients: Sequence[Tensor], num_images: int, hidden: int, typical: TypicalHead | None = None
) -> Tensor:
    """(N,) labels that every round's last layer shows, see `infer_labels`.

    Raises:
        AttackError: they differ.
    """
    labels = [infer_labels(gradient, num_images, hidden, typical) for gradient in gradients]
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
