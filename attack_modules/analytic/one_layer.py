"""Heads of one linear layer: the inputs of a softmax layer from its update."""

import torch
from torch import Tensor

from attack_modules.analytic.results import Reading, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace
from fl_lightning.loss import logit_errors


def head_inputs(
    gradient: Tensor, weight: Tensor, targets: Tensor, iterations: int = 30, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs (N, H) and probabilities (N, C) of a softmax layer from its summed gradient `(P - Y)^T inputs`.

    Args:
        gradient: (C, H), in any basis of the input space.
        weight: (C, H) in the same basis, half way through the local steps.
        targets: (N, C) one-hot, or as of `CrossEntropy.targets`. Images of one class come out as their mean.
        iterations: upper limit, of the fixed point between inputs and probabilities.
        classes: (M,) long, whose rows of the gradient alone are read; None for all.
    """
    read = slice(None) if classes is None else classes
    probabilities = torch.full_like(targets, 1 / targets.shape[1])
    for _ in range(iterations):
        errors = logit_errors(probabilities, targets)
        inputs = torch.linalg.lstsq(errors[:, read].T, gradient[read], driver="gelsd").solution
        previous, probabilities = probabilities, (inputs @ weight.T).softmax(1)
        if (probabilities - previous).abs().max() < torch.finfo(gradient.dtype).eps:
            break
    return inputs, probabilities


def read_single(space: RowSpace, targets: Tensor, training: TrainingKnowledge, scale: float) -> Reading:
    """Features under a head of one linear layer, whose inputs they are."""
    rows = space.rows * scale
    middle = space.weight - space.rows * training.half_way
    features, probabilities = head_inputs(rows, middle, targets)
    errors = logit_errors(probabilities, targets)
    peers = torch.zeros(len(targets), dtype=torch.long)
    return Reading(features, errors, peers, space.residual(errors, features, scale), 0.0)
