"""The head's training, simulated from an estimate of the features: it gives gates over time, and the peers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn import functional as F
from torch.special import ndtr

from attack_modules.analytic.gates import Gates, mean_activation, probably_active
from attack_modules.analytic.row_space import times, transposed_times
from fl_lightning.loss import logit_errors

SETTLED = 1e-4
"""Relative change in an iteration from which on the influence of images on each other is fitted."""


@dataclass(frozen=True)
class Trajectory:
    """What one hidden layer computes in the simulated training of the head on fixed features; T steps, N images.

    Attributes:
        preactivations: (T, N, H).
        errors: (T, N, H) back-propagated errors, without gates.
        above: (T, N, K) errors at the outputs of the layer above: `p - y` of the last layer, gated errors of others.
        past: (N, H) mean over the steps of the sum of gated errors before each, by which an image moves others.
    """

    preactivations: Tensor
    errors: Tensor
    above: Tensor
    past: Tensor

    @cached_property
    def activations(self) -> Tensor:
        """(N, H) mean over the steps."""
        return self.preactivations.relu().mean(0)

    @cached_property
    def residuals(self) -> Tensor:
        """(N, K) mean over the steps of the errors above."""
        return self.above.mean(0)

    @property
    def varying(self) -> tuple[Tensor, Tensor]:
        """How errors above (T N, K) and activations (T N, H) vary over the steps.

        The mean gradient of the layer above is the sum of the images' outer products of mean errors and mean
        activations, and of the product of these two: the covariance over the steps.
        """
        steps = len(self.above)
        errors, activations = (self.above - self.residuals) / steps, self.preactivations.relu() - self.activations
        return errors.flatten(0, 1), activations.flatten(0, 1)


def side_by_side(paths: Sequence[Trajectory]) -> Trajectory:
    """Several rounds as one, with their units (and classes, in `residuals`) concatenated."""
    names = [own.name for own in fields(Trajectory)]
    return Trajectory(*(torch.cat([getattr(path, name) for path in paths], -1) for name in names))


@dataclass
class _Layer:
    """A layer above the first in the simulated training, with the inputs and output errors of all steps so far."""

    weight: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)

    def forward(self, activations: Tensor, influence: Tensor, lr: float) -> Tensor:
        """(N, H) activations below -> (N, K) outputs, for each image in the model of its own peer."""
        inputs = F.pad(activations, (0, self.weight.shape[1] - activations.shape[1]), value=1.0)  # a bias
        outputs = times(self.weight, inputs.T).T
        for earlier, error in zip(self.inputs, self.errors, strict=True):
            outputs = outputs - lr * (inputs @ earlier.T * influence) @ error
        self.inputs.append(inputs)
        return outputs

    def backward(self, errors: Tensor, width: int, influence: Tensor, lr: float) -> Tensor:
        """(N, K) errors at the outputs -> (N, width) errors at the activations below, without gates."""
        found = transposed_times(self.weight, errors.T).T[:, :width]
        for earlier, error in zip(self.inputs[:-1], self.errors, strict=True):
            found = found - lr * (errors @ error.T * influence) @ earlier[:, :width]
        self.errors.append(errors)
        return found


def simulate(
    gram: Tensor, start: Tensor, weights: Sequence[Tensor], targets: Tensor, influence: Tensor, lr: float, steps: int
) -> list[Trajectory]:
    """Full-batch SGD of the head on fixed features, each image in the model of its own peer.

    Args:
        gram: (N, N) inner products of the features.
        start: (N, H) pre-activations of the first layer before the round.
        weights: (out, in) of each layer above the first before the round, (out, in + 1) with a bias.
        targets: (N, C) as of `CrossEntropy.targets`.
        influence: (N, N) weight of image m in the gradient of image n's peer: 1 / peer size, or 0 for another peer's.
        lr: of the peers.
        steps: that each of them takes.

    Returns:
        Of each hidden layer, the first one first.
    """
    layers = [_Layer(weight) for weight in weights]
    widths = [start.shape[1], *(len(weight) for weight in weights[:-1])]
    total = [start.new_zeros(len(start), width) for width in widths]
    past = [torch.zeros_like(errors) for errors in total]
    preactivations, errors = [[] for _ in layers], [[] for _ in layers]
    for _ in range(steps):
        outputs = start - lr * (gram * influence) @ total[0]
        for layer, kept in zip(layers, preactivations, strict=True):
            kept.append(outputs)
            outputs = layer.forward(outputs.relu(), influence, lr)
        error = logit_errors(outputs.softmax(1), targets)
        for i in reversed(range(len(layers))):
            errors[i].append(layers[i].backward(error, widths[i], influence, lr))
            error = errors[i][-1] * (preactivations[i][-1] > 0)
            past[i] = past[i] + total[i] / steps
            total[i] = total[i] + error
    stack = torch.stack
    return [
        Trajectory(stack(kept), stack(ungated), stack(layer.errors), moved)
        for layer, kept, ungated, moved in zip(layers, preactivations, errors, past, strict=True)
    ]


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

    Least squares `drift ~ lr * (influence * gram) @ past` on the entries `seen`, by accelerated projected gradient, in
    float32, to whose rounding the drift is known in any case.

    Args:
        drift: (N, H) pre-activation before the round minus mean activation during it.
        seen: (N, H) whether a unit was active throughout, so that its drift is observed.
        gram: (N, N) inner products of the features.
        past: (N, H) as in `Trajectory`.
        lr: of the peers.
        influence: (N, N) start.
        iterations: upper limit, of the projected gradient.
        mixing: (N, N) metric of the misfit where the drift is observed only as sums over images; None: the identity.
    """
    drift, seen, gram, past, influence = (given.float() for given in (drift, seen, gram, past, influence))
    mixing = None if mixing is None else mixing.float()

    def gradient(matrix: Tensor, target: Tensor | float) -> Tensor:
        misfit = seen * ((matrix * gram) @ past * lr - target)
        slope = seen * (misfit if mixing is None else mixing @ misfit) @ past.T * gram * lr
        return (slope + slope.T) / 2

    direction, largest = gram, 0.0
    for _ in range(50):
        direction = gradient(direction / direction.norm(), 0.0)
        before, largest = largest, direction.norm().item()
        if largest < (1 + SETTLED) * before:
            break
    step = 1 / (1.05 * largest)
    ahead, momentum = influence, 1.0
    for _ in range(iterations):
        new = (ahead - step * gradient(ahead, drift)).clamp_min(0)
        next_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        moved = new - influence
        ahead = new + (momentum - 1) / next_momentum * moved
        influence, momentum = new, next_momentum
        if moved.norm() < SETTLED * new.norm():
            break
    return influence.double()


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
