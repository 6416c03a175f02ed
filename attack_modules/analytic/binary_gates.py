"""Gates of a single local step, which are 0 or 1: a discrete search.

Notation as in `analytic.leak`. Three sources of evidence determine each gate. (1) The last layer's update gives the
activation, with rounding noise. (2) `W1 f` gives the pre-activation, as accurately as the features are known. (3) A row
of `Delta = gates * errors` must lie in the column space of the first layer's update, which a single wrong gate violates
as long as there are more live units than images. The third is by far the sharpest, but it involves all gates of an
image, so two wrong ones can cancel: the search flips single gates and pairs, while the variance of the constraint falls
from what the first two sources leave open to the rounding noise.
"""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

from attack_modules.analytic.row_space import RowSpace

LEVELS = 8
"""Number of variances between the prior's and that of rounding."""
CANDIDATES = 512
"""Least certain units of an image among which flips are tried; bounds time and memory for wide layers."""


def binary_gates(
    space: RowSpace, scale: float, errors: Tensor, activations: Tensor, dropout: float = 0.0, iterations: int = 6
) -> tuple[Tensor, Tensor]:
    """Gates and features of a single step, estimated alternately until they stay the same.

    Args:
        space: of the layer's update.
        scale: by which the update is multiplied to give the summed gradient.
        errors: (N, H) back-propagated errors with every gate open.
        activations: (N, H) noisy, from the update of the layer above.
        dropout: rate at which active units are dropped, whose gates are shut then.
        iterations: upper limit, of gates -> features -> gates.

    Returns:
        Gates (N, H) in {0, 1}, and features (N, r).
    """
    rows, weight, width = space.rows * scale, space.weight, space.update.shape[1]
    live = rows.any(1)
    found = torch.zeros_like(errors)
    rows, weight, errors, activations = rows[live], weight[live], errors[:, live], activations[:, live]
    vectors, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    num_images, excess = len(errors), max(len(rows) - len(errors), 0)
    inside = vectors[:, :num_images]  # (live, N)
    unexplained = singular[num_images:].square().sum() + space.rest.sum() * scale**2
    rounding = unexplained / max(excess * (width - num_images), 1)
    resolved = 1e-12 * errors.square().mean()  # by float64

    noise = activations.clamp_max(0).square().sum(1, keepdim=True) / (activations < 0).sum(1, keepdim=True).clamp_min(1)
    noise = noise.sqrt().clamp_min(torch.finfo(torch.float32).eps * activations.abs().max())
    preactivations = torch.zeros_like(activations)
    spread = (2 * activations.square().mean(1, keepdim=True)).sqrt()  # half of the units are inactive
    gates = None
    for _ in range(iterations):
        logit = gate_logit(activations, noise, preactivations, spread, dropout)
        chance = logit.sigmoid()
        start = (chance > 0.5).to(rows)
        known = start if gates is None else gates
        features = torch.linalg.lstsq((known * errors).T, rows, driver="gelsd").solution
        floor = (rounding * torch.linalg.pinv(features @ features.T, hermitian=True).diagonal()).clamp_min(resolved)
        outside = (1 - inside.square().sum(1)).clamp_min(0)
        open_ = (chance * (1 - chance) * errors.square()) @ outside / max(excess, 1)
        ladder = floor[:, None] * (open_ / floor).clamp_min(1)[:, None] ** torch.linspace(1, 0, LEVELS + 1).to(rows)
        settled = torch.stack(
            [
                settle(inside, errors[image], logit[image], [start[image], known[image]], ladder[image])
                for image in range(num_images)
            ]
        )
        features = torch.linalg.lstsq((settled * errors).T, rows, driver="gelsd").solution
        if gates is not None and torch.equal(gates, settled):
            break
        gates = settled
        preactivations = features @ weight.T
        seen = activations > 5 * noise
        mismatch = ((preactivations - activations).square() * seen).sum(1, keepdim=True)
        spread = (mismatch / seen.sum(1, keepdim=True).clamp_min(1)).sqrt().maximum(noise)
    found[:, live] = settled
    return found, features


def gate_logit(
    activations: Tensor, noise: Tensor, preactivations: Tensor, spread: Tensor, dropout: float = 0.0
) -> Tensor:
    """(N, H) log odds that a unit is active and not dropped, from two noisy values of its pre-activation.

    Args:
        activations: (N, H) its positive part, 0 where it is dropped, with Gaussian noise.
        noise: (N, 1) standard deviation of that noise.
        preactivations: (N, H) the pre-activation itself, with Gaussian noise.
        spread: (N, 1) standard deviation of that noise.
        dropout: rate at which active units are dropped.
    """
    total = torch.hypot(noise, spread)
    mean = (activations * spread**2 + preactivations * noise**2) / total**2
    open_ = (
        -((activations - preactivations) / total).square() / 2 - total.log() + log_ndtr(mean * total / noise / spread)
    )
    shut = log_ndtr(-preactivations / spread)
    if dropout:
        dropped = math.log(dropout) - math.log1p(-dropout) + log_ndtr(preactivations / spread)
        shut = torch.logaddexp(shut - math.log1p(-dropout), dropped)
    return open_ + (activations / noise).square() / 2 + noise.log() - shut


def settle(inside: Tensor, errors: Tensor, logit: Tensor, starts: list[Tensor], ladder: Tensor) -> Tensor:
    """(H,) most probable gates of one image: the better of a search with falling variance and one from known gates.

    Args:
        inside: (H, N) orthonormal basis of the column space in which `gates * errors` lies.
        errors: (H,) of the image.
        logit: (H,) prior log odds of an active unit.
        starts: gates (H,) for the first search, and for the second, which uses the last variance only.
        ladder: falling variances of an entry of the violation.
    """
    search = GateSearch(inside, errors, logit)
    descending, known = starts
    for variance in ladder.tolist():
        descending, cost = search.flip(descending, variance)
    improved, other_cost = search.flip(known, variance)
    return descending if cost <= other_cost else improved


class GateSearch:
    """Search for the gates of one image.

    The cost is quadratic with a positive semidefinite Hessian, the gram matrix of what single units have outside of the
    column space. So a flip lowers it only where its first derivative is negative; a pair, where that of one of the two
    is. Mostly there are few such units, and only their rows of the matrix are computed.

    Args:
        inside, errors, logit: as of `settle`.
    """

    def __init__(self, inside: Tensor, errors: Tensor, logit: Tensor) -> None:
        self.inside, self.errors, self.logit = inside, errors, logit
        self.units = logit.abs().topk(min(CANDIDATES, len(logit)), largest=False).indices
        self.parts, self.odds, self.own = inside[self.units], logit[self.units], errors[self.units]
        self.curvature = (1 - self.parts.square().sum(1)).clamp_min(0) * self.own.square()
        self.gram = self.parts.new_empty(len(self.units), len(self.units))  # beside the diagonal
        self.computed = torch.zeros(len(self.units), dtype=torch.bool)

    def flip(self, gates: Tensor, variance: float) -> tuple[Tensor, float]:
        """Greedily flip single gates and pairs until no flip lowers the cost; returns gates (H,) and their cost."""
        gates, curvature = gates.clone(), self.curvature / variance
        least = -1e-9 * (1 + curvature.max())  # or rounding would flip forever
        while True:
            gated = gates * self.errors
            violation = gated - self.inside @ (gated @ self.inside)
            sign = 1 - 2 * gates[self.units]
            slope = sign * (self.own * violation[self.units] / variance - self.odds)
            falling = torch.where(slope < 0)[0]
            if not len(falling):
                break
            alone = slope + curvature / 2
            change = alone[falling, None] + alone + sign[falling, None] * self._rows(falling) / variance * sign
            change[torch.arange(len(falling)), falling] = alone[falling]
            first, second = divmod(int(change.argmin()), len(self.units))
            if change[first, second] >= least:
                break
            for flipped in {int(falling[first]), second}:
                gates[self.units[flipped]] += sign[flipped]
        return gates, (violation.square().sum() / (2 * variance) - gates @ self.logit).item()

    def _rows(self, of: Tensor) -> Tensor:
        """(n, H) rows of the gram matrix."""
        new = of[~self.computed[of]]
        self.gram[new] = -self.own[new, None] * self.own * (self.parts[new] @ self.parts.T)
        self.computed[new] = True
        return self.gram[of]
