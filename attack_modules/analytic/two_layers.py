"""Heads of two linear layers with a ReLU between, where every image has a class of its own."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

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
from attack_modules.analytic.row_space import RowSpace
from fl_lightning.loss import logit_errors


def read_stack(
    space: RowSpace,
    last: Sequence[Tensor],
    weight: Sequence[Tensor],
    targets: Tensor,
    training: TrainingKnowledge,
    scale: float,
    iterations: int,
) -> Reading:
    """Features under a head of two linear layers with a ReLU between.

    The hidden units of all rounds are treated as units of one wide layer.

    Args:
        space: of the first layer's updates, round under round.
        last: of each round, (C, H) update of the last layer, (C, H + 1) with a bias.
        weight: of each round, the last layer before it, of the same shape.
        targets: (N, C) as of `CrossEntropy.targets`.
        training: how the peers trained.
        scale: N / (lr * steps).
        iterations: rounds of features -> simulated training -> gates -> features.
    """
    steps, rows = training.steps, space.rows * scale
    hidden = len(rows) // len(last)
    activations, errors = [], []
    for gradient, before in zip(last, weight, strict=True):
        middle = before - gradient * training.half_way
        inputs, probabilities = head_inputs(gradient * scale, middle, targets)
        activations.append(inputs[:, :hidden])
        errors.append((logit_errors(probabilities, targets) @ middle)[:, :hidden])
    activations, errors = torch.cat(activations, 1), torch.cat(errors, 1)

    regression = GateRegression(rows, len(targets))
    noise = (errors.square().sum() / rows.square().sum() * regression.noise * len(targets)).expand(len(targets))
    prior = partial(gates_of_activations, activations)
    for _ in range(2 if steps > 1 else 0):
        gates = regression.best(prior, errors, noise)
        features = regress_features(rows, gates.mean * errors, gates.variance * errors**2, regression.noise)
        noise = regression.noise * torch.linalg.pinv(features @ features.T, hermitian=True).diagonal()
    if steps == 1:
        open_, features = binary_gates(rows, space.weight, errors, activations, space.update.shape[1])
        gates = Gates(open_, torch.zeros_like(open_))
    influence = torch.full((len(targets), len(targets)), 1 / len(targets), dtype=rows.dtype)
    peers = torch.zeros(len(targets), dtype=torch.long)
    bias = weight[0].shape[1] > hidden

    def simulated(features: Tensor, influence: Tensor) -> Trajectory:
        gram, starts = features @ features.T, (features @ space.weight.T).split(hidden, 1)
        return side_by_side(
            [
                simulate(gram, start, before, targets, influence, training.lr, steps, bias)
                for start, before in zip(starts, weight, strict=True)
            ]
        )

    def reading(path: Trajectory) -> Reading:
        gated = gates.mean * errors
        throughout = (path.preactivations > 0).all(0)
        mismatch = (path.activations - activations)[throughout].square().mean().sqrt() / activations[throughout].mean()
        residual = ((rows - gated.T @ features).norm() / rows.norm()).item()
        return Reading(features, gated, peers, residual, mismatch.item())

    path = simulated(features, influence)
    readings = [reading(path)]
    for _ in range(iterations if steps > 1 else 0):
        seen = (path.preactivations > 0).all(0).to(rows)
        drift = path.preactivations[0] - activations
        influence = co_members(drift, seen, features @ features.T, path.past, training.lr, influence)
        peers = group_peers(influence)
        together = (peers[:, None] == peers).to(rows)
        influence = together / together.sum(1, keepdim=True)
        if len(readings) == 1:  # it was read as if all images were of one peer; its drift shows the peers
            readings[0] = replace(readings[0], peers=peers)
        path = simulated(features, influence)
        residuals = path.residuals.split(targets.shape[1], 1)
        activations = torch.cat(
            [
                torch.linalg.lstsq(residual.T, gradient * scale, driver="gelsd").solution[:, :hidden]
                for residual, gradient in zip(residuals, last, strict=True)
            ],
            1,
        )
        errors = path.errors.mean(0)
        gates = regression.best(partial(gates_of_trajectory, path, activations), errors, noise)
        features = regress_features(rows, gates.mean * errors, gates.variance * errors**2, regression.noise)
        noise = regression.noise * torch.linalg.pinv(features @ features.T, hermitian=True).diagonal()
        path = simulated(features, influence)
        readings.append(reading(path))
        if (features - readings[-2].coordinates).norm() < torch.finfo(torch.float32).eps * features.norm():
            break
    return min(readings, key=lambda found: found.drift)  # simulating from poor features can diverge
