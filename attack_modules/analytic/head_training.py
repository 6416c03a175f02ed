"""The head's training, simulated from an estimate of the features: it gives gates over time, and the peers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn import functional as F
from torch.special import ndtr

from attack_modules.analytic.gates import Gates, mean_activation, probably_active
from fl_lightning.loss import logit_errors


@dataclass(frozen=True)
class Trajectory:
    """The simulated training of the head on fixed features; T steps, N images.

    Attributes:
        preactivations: (T, N, H).
        errors: (T, N, H) back-propagated errors, without gates.
        activations: (N, H) mean over the steps.
        past: (N, H) mean over the steps of the sum of gated errors before each, by which an image moves others.
        residuals: (N, C) mean of `p - y`.
    """

    preactivations: Tensor
    errors: Tensor
    activations: Tensor
    past: Tensor
    residuals: Tensor


def side_by_side(paths: Sequence[Trajectory]) -> Trajectory:
    """Several rounds as one, with their units (and classes, in `residuals`) concatenated."""
    names = [field.name for field in fields(Trajectory)]
    return Trajectory(*(torch.cat([getattr(path, name) for path in paths], -1) for name in names))


def simulate(
    gram: Tensor, start: Tensor, weight: Tensor, targets: Tensor, influence: Tensor, lr: float, steps: int, bias: bool
) -> Trajectory:
    """Full-batch SGD of the head on fixed features, each image in the model of its own peer.

    Args:
        gram: (N, N) inner products of the features.
        start: (N, H) pre-activations before the round.
        weight: (C, H) of the last layer before the round, (C, H + 1) with `bias`.
        targets: (N, C) as of `CrossEntropy.targets`.
        influence: (N, N) weight of image m in the gradient of image n's peer: 1 / peer size, or 0 for another peer's.
        lr: of the peers.
        steps: that each of them takes.
        bias: whether the last layer has one.
    """
    past_errors, total = torch.zeros_like(start), torch.zeros_like(start)
    inputs, residuals, preactivations, errors = [], [], [], []
    width = start.shape[1]
    for _ in range(steps):
        past_errors = past_errors + total / steps
        preactivation = start - lr * (gram * influence) @ total
        active = F.pad(preactivation.relu(), (0, int(bias)), value=1.0)
        logits = active @ weight.T
        for earlier, residual in zip(inputs, residuals, strict=True):
            logits = logits - lr * (active @ earlier.T * influence) @ residual
        now = logit_errors(logits.softmax(1), targets)
        error = now @ weight[:, :width]
        for earlier, residual in zip(inputs, residuals, strict=True):
            error = error - lr * (now @ residual.T * influence) @ earlier[:, :width]
        total = total + error * (preactivation > 0)
        inputs.append(active)
        residuals.append(now)
        preactivations.append(preactivation)
        errors.append(error)
    stack = torch.stack
    return Trajectory(
        stack(preactivations), stack(errors), stack(inputs).mean(0)[:, :width], past_errors, stack(residuals).mean(0)
    )


def co_members(
    drift: Tensor,
    seen: Tensor,
    gram: Tensor,
    past: Tensor,
    lr: float,
    influence: Tensor,
    iterations: int = 200,
    mixing: Tensor | None = None,
) -> Tensor:
    """(N, N) symmetric, non-negative influence of images on each other, fitted to the drift of their activations.

    Least squares `drift ~ lr * (influence * gram) @ past` on the entries `seen`, by accelerated projected gradient.

    Args:
        drift: (N, H) pre-activation before the round minus mean activation during it.
        seen: (N, H) whether a unit was active throughout, so that its drift is observed.
        gram: (N, N) inner products of the features.
        past: (N, H) as in `Trajectory`.
        lr: of the peers.
        influence: (N, N) start.
        iterations: of the projected gradient.
        mixing: (N, N) metric of the misfit where the drift is observed only as sums over images; None: the identity.
    """

    def gradient(matrix: Tensor, target: Tensor | float) -> Tensor:
        misfit = seen * ((matrix * gram) @ past * lr - target)
        slope = seen * (misfit if mixing is None else mixing @ misfit) @ past.T * gram * lr
        return (slope + slope.T) / 2

    direction = gram
    for _ in range(50):
        direction = gradient(direction / direction.norm(), 0.0)
    step = 1 / (1.05 * direction.norm())
    ahead, momentum = influence, 1.0
    for _ in range(iterations):
        new = (ahead - step * gradient(ahead, drift)).clamp_min(0)
        next_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / next_momentum * (new - influence)
        influence, momentum = new, next_momentum
    return influence


def group_peers(influence: Tensor) -> Tensor:
    """(N,) peer of each image: average-linkage clustering of the rows of `influence` (N, N) by their cosine.

    With average linkage a single pair that is similar by chance, as happens where the training changes the model much,
    does not merge two peers. Rows of one peer have a cosine of nearly 1, of two peers nearly 0; where few classes are
    shared and features drift much, 0.52 to 0.7 and 0.4 to 0.53 on average.
    """
    if len(influence) < 2:
        return torch.zeros(len(influence), dtype=torch.long)
    unit = F.normalize(influence, dim=1)
    distances = (1 - unit @ unit.T).clamp_min(0).nan_to_num(1.0).fill_diagonal_(0)
    groups = fcluster(linkage(squareform(distances.numpy(), checks=False), "average"), 0.45, "distance")
    first = (groups[:, None] == groups).argmax(1)  # numbers the groups in the order of their first images
    return torch.from_numpy(first).unique(return_inverse=True)[1]


def offset_to_match(preactivations: Tensor, activations: Tensor) -> Tensor:
    """(N, H) shift `o` nearest to 0 for which `mean_t relu(preactivations + o)` equals `activations` (N, H)."""
    steps = len(preactivations)
    ordered = preactivations.sort(0, descending=True).values
    target = activations.clamp_min(0)
    count = torch.arange(1, steps + 1, dtype=ordered.dtype)[:, None, None]
    shifts = (steps * target - ordered.cumsum(0)) / count  # row k: if exactly the k + 1 largest are active
    after = torch.cat([ordered[1:], torch.full_like(ordered[:1], -math.inf)])
    consistent = (ordered + shifts >= 0) & (after + shifts <= 0)
    shift = shifts.gather(0, consistent.double().argmax(0, keepdim=True))[0]
    return torch.where(target > 0, shift, (-ordered[0]).clamp_max(0))


def gates_of_trajectory(path: Trajectory, activations: Tensor | None, width: float) -> Gates:
    """Gates from a simulated trajectory, shifted unit by unit to match the observed mean activations (N, H), if any.

    `width` is the remaining standard deviation of a pre-activation, in units of the image's mean activation.
    """
    if activations is None:
        active = ndtr(path.preactivations / (width * mean_activation(path.activations)))
    else:
        matched = path.preactivations + offset_to_match(path.preactivations, activations)
        active = ndtr(matched / (width * mean_activation(activations))) * probably_active(activations)
    return Gates((path.errors * active).mean(0) / path.errors.mean(0), (active * (1 - active)).mean(0))
