"""Heads of two or more linear layers with ReLUs between, where every image has a class of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.binary_gates import binary_gates
from attack_modules.analytic.gates import GateRegression, Gates, gates_of_activations, regress_features
from attack_modules.analytic.head_training import (
    Trajectory,
    co_members,
    gates_of_trajectory,
    group_peers,
    side_by_side,
    simulate,
)
from attack_modules.analytic.one_layer import head_inputs
from attack_modules.analytic.results import Reading, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace, transposed_times
from fl_lightning.loss import logit_errors

SETTLED = 1e-4
"""Relative change of the features in an iteration up to which the next is not needed. Measured: it changes them by a
tenth of that at most, or back to what they were; features of several steps are off by 4e-3."""


@dataclass(frozen=True)
class UpperLayer:
    """A layer above the first in one round; a bias is the last column.

    Attributes:
        update: (out, in).
        weight: (out, in) before the round.
    """

    update: Tensor
    weight: Tensor


class _HiddenLayer:
    """A layer whose outputs are hidden units: its gates, and with them its inputs, from its update.

    Args:
        space: of its update, of one round or of several, round under round.
        num_images: N.
        scale: N / (lr * steps).
        training: how the peers trained.
        dropped: rate of the dropout behind its ReLUs.
    """

    def __init__(
        self, space: RowSpace, num_images: int, scale: float, training: TrainingKnowledge, dropped: float
    ) -> None:
        self.space = space
        self.rows = space.rows * scale
        self.scale = scale
        self.steps = training.steps
        self.dropped = dropped
        self.num_images = num_images
        self.rest = space.rest.sum().item() * scale**2
        if self.steps > 1:
            self.regression = GateRegression(self.rows, num_images, self.rest)

    def read(self, activations: Tensor, errors: Tensor) -> None:
        """Set the gates and inputs that the layer above shows: `activations` and ungated `errors`, both (N, H)."""
        self.activations, self.errors = activations, errors
        if self.steps == 1:
            kept = 1 - self.dropped  # what dropout keeps counts 1 / kept times, on the way up and down
            self.activations, self.errors = activations * kept, errors / kept
            open_, self.inputs = binary_gates(self.space, self.scale, self.errors, self.activations, self.dropped)
            self.gates = Gates(open_, torch.zeros_like(open_))
            return
        start = errors.square().sum() / self.rows.square().sum() * self.regression.noise * self.num_images
        self.noise = start.expand(self.num_images)
        for _ in range(2):
            self._regress(partial(gates_of_activations, activations))

    def without(self, varying: tuple[Tensor, Tensor]) -> None:
        """Take what varies over the steps out of the update, see `Trajectory.varying`; a bias does not."""
        errors, inputs = varying
        inputs = F.pad(inputs, (0, self.space.update.shape[1] - inputs.shape[1]))
        self.rows = self.space.rows * self.scale - errors.T @ self.space.coordinates(inputs)
        self.regression = GateRegression(self.rows, self.num_images, self.rest)

    def read_again(self, path: Trajectory, activations: Tensor, errors: Tensor) -> None:
        """Set gates and inputs anew, with the simulated training of the hidden units."""
        self.activations, self.errors = activations, errors
        self._regress(partial(gates_of_trajectory, path, activations))

    def _regress(self, prior: partial[Gates]) -> None:
        regression = self.regression
        self.gates = regression.best(prior, self.errors, self.noise)
        variance = self.gates.variance * self.errors**2
        self.inputs = regress_features(self.rows, self.gated, variance, regression.noise)
        self.noise = regression.noise * torch.linalg.pinv(self.inputs @ self.inputs.T, hermitian=True).diagonal()

    @property
    def all_inputs(self) -> Tensor:
        """(N, in) inputs, not in coordinates; that of a bias comes last."""
        return self.space.vectors(self.inputs)

    @property
    def gated(self) -> Tensor:
        """(N, H) errors at the outputs before the ReLUs."""
        return self.gates.mean * self.errors


@dataclass
class _Round:
    """The layers above the first in one round, as they are read; the one below the last layer comes last in `hidden`.

    Attributes:
        upper: the layers above the first.
        hidden: those of them whose outputs are hidden units.
        last: (C, H) summed gradient of the last layer, (C, H + 1) with a bias.
        width: number of units of the first layer.
        half_way: share of the update after which the model is half way through the local steps.
        activations: (N, H) of the first layer's units.
        errors: (N, H) at these, without gates.
    """

    upper: Sequence[UpperLayer]
    hidden: Sequence[_HiddenLayer]
    last: Tensor
    width: int
    half_way: float
    activations: Tensor = field(init=False)
    errors: Tensor = field(init=False)

    @classmethod
    def of(
        cls, upper: Sequence[UpperLayer], width: int, targets: Tensor, training: TrainingKnowledge, scale: float
    ) -> "_Round":
        hidden = [
            _HiddenLayer(
                RowSpace.of(layer.update, layer.weight), len(targets), scale, training, training.dropout_behind(i + 1)
            )
            for i, layer in enumerate(upper[:-1])
        ]
        return cls(upper, hidden, upper[-1].update.double() * scale, width, training.half_way)

    def read(self, targets: Tensor) -> None:
        """From the last layer down: its inputs and their errors, gated, give the inputs of the layer below."""
        layer = self.upper[-1]
        middle = layer.weight.double() - layer.update.double() * self.half_way
        inputs, probabilities = head_inputs(self.last, middle, targets)
        errors = logit_errors(probabilities, targets) @ middle
        for i in reversed(range(len(self.hidden))):
            width = len(self.upper[i].weight)
            self.hidden[i].read(inputs[:, :width], errors[:, :width])
            inputs, errors = self.hidden[i].all_inputs, self._below(i, self.hidden[i].gated)
        self.activations, self.errors = inputs[:, : self.width], errors[:, : self.width]

    def read_again(self, paths: Sequence[Trajectory]) -> None:
        """The same with the simulated training of all hidden layers, the first one first.

        Simulated errors are those of simulated gates, so they are corrected by the gates that the layer above has.
        """
        varying, activations = paths[-1].varying
        constant = self.last - varying.T @ F.pad(activations, (0, self.last.shape[1] - activations.shape[1]))
        inputs = torch.linalg.lstsq(paths[-1].residuals.T, constant, driver="gelsd").solution
        errors = paths[-1].errors.mean(0)
        for i in reversed(range(len(self.hidden))):
            found, width = self.hidden[i], len(self.upper[i].weight)
            found.without(paths[i].varying)
            found.read_again(paths[i + 1], inputs[:, :width], errors)
            corrected = self._below(i, found.gated - paths[i].residuals)
            inputs, errors = found.all_inputs, paths[i].errors.mean(0) + corrected[:, : paths[i].errors.shape[2]]
        self.activations, self.errors = inputs[:, : self.width], errors

    def _below(self, i: int, errors: Tensor) -> Tensor:
        """(N, H) errors at the outputs of an upper layer -> (N, in) errors at its inputs, half way."""
        layer = self.upper[i]
        return (transposed_times(layer.weight, errors.T) - self.half_way * transposed_times(layer.update, errors.T)).T


def read_stack(
    space: RowSpace,
    upper: Sequence[Sequence[UpperLayer]],
    targets: Tensor,
    training: TrainingKnowledge,
    scale: float,
    iterations: int,
) -> Reading:
    """Features under a head of two or more linear layers with ReLUs between.

    The last layer's update gives its inputs, whose errors, gated, give the update of the layer below as a sum of outer
    products, and so its inputs, and so on down to the features. The first layer's units of all rounds are treated as
    units of one wide layer.

    Args:
        space: of the first layer's updates, round under round.
        upper: of each round, the layers above the first, the last layer last.
        targets: (N, C) as of `CrossEntropy.targets`.
        training: how the peers trained.
        scale: N / (lr * steps).
        iterations: rounds of features -> simulated training -> gates -> features.
    """
    steps, width = training.steps, len(space.rows) // len(upper)
    rounds = [_Round.of(layers, width, targets, training, scale) for layers in upper]
    for round_ in rounds:
        round_.read(targets)
    first = _HiddenLayer(space, len(targets), scale, training, training.dropout_behind(0))

    def shown() -> list[Tensor]:
        """Activations and errors (N, H) of the first layer's units, of all rounds side by side."""
        return [torch.cat([getattr(round_, name) for round_ in rounds], 1) for name in ("activations", "errors")]

    first.read(*shown())
    influence = torch.full((len(targets), len(targets)), 1 / len(targets), dtype=space.rows.dtype)
    peers = torch.zeros(len(targets), dtype=torch.long)
    weights = [[layer.weight for layer in layers] for layers in upper]

    def simulated() -> tuple[list[list[Trajectory]], Trajectory]:
        """Of each round all hidden layers, and the first one of all rounds side by side."""
        gram, starts = first.inputs @ first.inputs.T, (first.inputs @ space.weight.T).split(width, 1)
        paths = [
            simulate(gram, start, before, targets, influence, training.lr, steps)
            for start, before in zip(starts, weights, strict=True)
        ]
        return paths, side_by_side([path[0] for path in paths])

    def reading(path: Trajectory) -> Reading:
        throughout = (path.preactivations > 0).all(0)
        if first.dropped:
            throughout &= first.gates.mean > 0
        off = (path.activations - first.activations)[throughout].square().mean().sqrt()
        mismatch = off / first.activations[throughout].abs().mean()
        residual = space.residual(first.gated, first.inputs, scale)
        return Reading(first.inputs, first.gated, peers, residual, mismatch.item())

    paths, path = simulated()
    readings = [reading(path)]
    for _ in range(iterations if steps > 1 else 0):
        seen = (path.preactivations > 0).all(0).to(space.rows)
        drift = path.preactivations[0] - first.activations
        gram = first.inputs @ first.inputs.T
        influence = co_members(drift, seen, gram, path.past, training.lr, influence)
        peers = group_peers(influence)
        together = (peers[:, None] == peers).to(space.rows)
        influence = together / together.sum(1, keepdim=True)
        if len(readings) == 1:  # it was read as if all images were of one peer; its drift shows the peers
            readings[0] = replace(readings[0], peers=peers)
        paths, path = simulated()
        for round_, layers in zip(rounds, paths, strict=True):
            round_.read_again(layers)
        first.read_again(path, *shown())
        paths, path = simulated()
        readings.append(reading(path))
        change = (first.inputs - readings[-2].coordinates).norm()
        if change < SETTLED * first.inputs.norm():
            break
    return min(readings, key=lambda found: found.drift)  # simulating from poor features can diverge
