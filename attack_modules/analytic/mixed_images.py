"""Which images were mixed with which, and in which shares (mixup), from the update of the head's first layer.

Notation as in `analytic.leak`. Where a peer trains on `lam x_a + (1 - lam) x_b` with the label mixed alike, the
back-propagated error is `E_ab = lam E_a + (1 - lam) E_b`, and `gates * E_ab` lies in the column space of the first
layer's update for pairs and shares that were trained on, and for no others: gates are found for every ordered pair, and
what they leave outside of that space tells the right ones. Each image is the first of one pair. The shares of a pair
that was trained on as (b, a, 1 - lam) are the same, so the first image is taken to be that with the larger share. The
errors depend on the probabilities that the model predicts for the mixture, which are first those of typical images, and
then those that the last layer's update shows if the pairs are right.

What is read then are the features of mixed images; the images themselves are unmixed after the inversion
(`feature_inversion`), because features are not linear in the images.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attack_modules.analytic.binary_gates import binary_gates
from attack_modules.analytic.defended_head import (
    DefendedFeatures,
    DefendedReading,
    Expected,
    HeadRound,
    LastLayer,
    UnreadableDefense,
)
from attack_modules.analytic.one_layer import head_inputs
from attack_modules.analytic.row_space import RowSpace
from attack_modules.analytic.uncertainty import feature_uncertainty
from fl_lightning.defenses import Defense, Mixup
from fl_lightning.loss import logit_errors

STARTS = (0.55, 0.7, 0.85)
"""Shares of the first image from which the search starts."""
ITERATIONS = 15
"""Of gates and shares, alternately."""
PASSES = 3
"""Of pairs and predicted probabilities, alternately."""
LEAST_OPEN = 0.2
"""Size of the gated errors, relative to all, below which gates explain a pair by being closed."""
PAIRS_AT_ONCE = 4096
"""Which bounds memory."""
MOST_OUTSIDE = 0.05
"""Share of a pair's gated errors outside of the column space up to which it may be right. Measured: at most 0.002 where
it is, at least 0.08 where it is not."""
UNMIXED = 0.99
"""Share from which an image was mixed with none, so that every partner fits. Measured: 0.9999."""


class MixedImages(DefendedReading):
    """Reads updates of a local step on mixtures of two images each; pairs and shares are estimated."""

    noisy = False
    single_step = True

    @classmethod
    def against(cls, defenses: Sequence[Defense]) -> "MixedImages | None":
        return cls() if any(isinstance(defense, Mixup) for defense in defenses) else None

    def mixing(self, directions: Tensor, last: LastLayer) -> Tensor:
        layer, targets, every = last.weight[:, : len(directions)], last.targets, torch.arange(len(last.targets))
        predicted = last.probabilities.expand_as(targets)
        for _ in range(PASSES):
            errors = torch.stack([logit_errors(one.expand_as(targets), targets) @ layer for one in predicted])
            partner, share, outside = pairs(directions, errors)
            mixing = share.diag()
            mixing[every, partner] += 1 - share
            _, predicted = head_inputs(last.gradient, last.weight, mixing @ targets)
        if (worst := outside.max().item()) > MOST_OUTSIDE:
            raise UnreadableDefense(
                f"Which images were mixed does not show: of the likeliest pairs, one leaves {worst:.0%} of its errors "
                "unexplained."
            )
        return mixing

    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        (seen,) = rounds
        space = RowSpace.of(seen.update, seen.weight)
        gates, coordinates = binary_gates(space, 1.0, seen.errors, seen.activations)
        gated = gates * seen.errors
        return DefendedFeatures(
            features=space.vectors(coordinates),
            gated=gated,
            uncertainty=feature_uncertainty(space.rows, gated, coordinates, space.rest),
            peers=torch.zeros(len(gated), dtype=torch.long),
            residual=space.residual(gated, coordinates),
        )


def pairs(directions: Tensor, errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image that each is mixed with.

    Args:
        directions: (H, N) orthonormal basis of the column space of the first layer's update.
        errors: (N, N, H) back-propagated errors of each label, by columns, at the probabilities that are predicted for
            the mixture of which each image, by rows, is the first; with every gate open.

    Returns:
        (N,) long, the partner of each image, itself where it was not mixed; (N,) its own share, at least 0.5; and (N,)
        the share of the mixture's gated errors outside of the column space.
    """
    count = len(errors)
    first, second = torch.cartesian_prod(torch.arange(count), torch.arange(count)).T
    shares, outside = [], []
    for a, b in zip(first.split(PAIRS_AT_ONCE), second.split(PAIRS_AT_ONCE), strict=True):
        tried = [fit_pairs(directions, errors[a, a], errors[a, b], start) for start in STARTS]
        left, best = torch.stack([found[1] for found in tried]).min(0)
        outside.append(left)
        shares.append(torch.stack([found[0] for found in tried]).gather(0, best[None])[0])
    shares, outside = torch.cat(shares).view(count, count), torch.cat(outside).view(count, count)
    partner = torch.from_numpy(linear_sum_assignment(outside.numpy())[1])
    every = torch.arange(count)
    share, left = shares[every, partner], outside[every, partner]
    return torch.where(share > UNMIXED, every, partner), torch.where(share > UNMIXED, 1.0, share), left


def fit_pairs(directions: Tensor, first: Tensor, second: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """Gates and shares of K pairs, alternately: (K,) share of the first image, and (K,) of the gated errors outside.

    Args:
        directions: (H, N), see `pairs`.
        first: (K, H) errors of the one image's label.
        second: (K, H) of the other's.
        start: share of the first image.
    """

    def outside(errors: Tensor) -> Tensor:
        return errors - errors @ directions @ directions.T

    share = first.new_full((len(first), 1), start)
    tiny = torch.finfo(first.dtype).tiny
    gates = torch.ones_like(first)
    for _ in range(ITERATIONS):
        errors = second + share * (first - second)
        gated = gates * errors
        inside = gated - outside(gated)
        gates = (inside * errors > errors.square() / 2).to(errors)
        slope, rest = outside(gates * (first - second)), outside(gates * second)
        share = -(slope * rest).sum(1, keepdim=True) / slope.square().sum(1, keepdim=True).clamp_min(tiny)
        share = share.clamp(0.5, 1.0)
    errors = second + share * (first - second)
    size = (gates * errors).norm(dim=1)
    left = outside(gates * errors).norm(dim=1) / size.clamp_min(tiny)
    return share[:, 0], torch.where(size > LEAST_OPEN * errors.norm(dim=1), left, 1.0)
