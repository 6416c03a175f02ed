"""Gates of a single local step, which are 0 or 1: a discrete search.

Notation as in `analytic.leak`. Three sources of evidence determine each gate. (1) The last layer's update gives the
activation, with rounding noise. (2) `W1 f` gives the pre-activation, as accurately as the features are known. (3) A row
of `Delta = gates * errors` must lie in the column space of the first layer's update, which a single wrong gate violates
as long as there are more live units than images. The third is by far the sharpest, but it involves all gates of an
image, so two wrong ones can cancel: the search flips single gates and pairs, while the variance of the constraint falls
from what the first two sources leave open to the rounding noise.
"""

import math
from collections.abc import Sequence

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
    column_space = ColumnSpace(vectors, num_images)
    unexplained = singular[num_images:].square().sum() + space.rest.sum() * scale**2
    rounding = unexplained / max(excess * (width - num_images), 1)
    resolved = 1e-12 * errors.square().mean()  # by float64

    noise = activations.clamp_max(0).square().sum(1, keepdim=True) / (activations < 0).sum(1, keepdim=True).clamp_min(1)
    noise = noise.sqrt().clamp_min(torch.finfo(torch.float32).eps * activations.abs().max())
    preactivations = torch.zeros_like(activations)
    spread = (2 * activations.square().mean(1, keepdim=True)).sqrt()  # half of the units are inactive
    gates = features = None
    for _ in range(iterations):
        logit = gate_logit(activations, noise, preactivations, spread, dropout)
        chance = logit.sigmoid()
        start = (chance > 0.5).to(rows)
        known = start if gates is None else gates
        if features is None:
            features = torch.linalg.lstsq((known * errors).T, rows, driver="gelsd").solution
        floor = (rounding * torch.linalg.pinv(features @ features.T, hermitian=True).diagonal()).clamp_min(resolved)
        open_ = (chance * (1 - chance) * errors.square()) @ column_space.share / max(excess, 1)
        ladder = floor[:, None] * (open_ / floor).clamp_min(1)[:, None] ** torch.linspace(1, 0, LEVELS + 1).to(rows)
        images = zip(errors, logit, zip(start, known, strict=True), ladder, strict=True)
        settled = torch.stack(
            [GateSearch(column_space, own, odds).settle(starts, falling) for own, odds, starts, falling in images]
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


class GateSearch:
    """Search for the gates of one image.

    The cost is quadratic with a positive semidefinite Hessian, the gram matrix of what single units have outside of the
    column space. So a flip lowers it only where its first derivative is negative; a pair, where the sum of both is.
    Mostly there are few such units, and only their part of the matrix is computed.

    Args:
        space: in which `gates * errors` lies.
        errors: (H,) of the image.
        logit: (H,) prior log odds of an active unit.
    """

    def __init__(self, space: "ColumnSpace", errors: Tensor, logit: Tensor) -> None:
        self.space, self.errors, self.logit = space, errors, logit
        self.units = logit.abs().topk(min(CANDIDATES, len(logit)), largest=False).indices
        self.odds, self.own = logit[self.units], errors[self.units]
        self.parts = self.own[:, None] * space.basis[self.units]
        self.curvature = space.share[self.units] * self.own.square()

    def settle(self, starts: Sequence[Tensor], ladder: Tensor) -> Tensor:
        """(H,) most probable gates: the better of a search with falling variance and one from known gates.

        Args:
            starts: gates (H,) for the first search, and for the second, which uses the last variance only.
            ladder: falling variances of an entry of the violation.
        """
        descending, known = starts
        (descending, cost), (improved, other_cost) = self.flip(descending, ladder), self.flip(known, ladder[-1:])
        return descending if cost <= other_cost else improved

    def flip(self, gates: Tensor, variances: Tensor) -> tuple[Tensor, float]:
        """Greedily flip single gates and pairs until no flip lowers the cost, of one variance after the other.

        Returns:
            Gates (H,), and their cost with the last variance.
        """
        gates = gates.clone()
        violation = self.space.outside(gates * self.errors)
        for variance in variances.tolist():
            while len(flips := self._best(gates[self.units], violation[self.units], variance)):
                gates[flips] = 1 - gates[flips]
                violation = self.space.outside(gates * self.errors)
        return gates, (violation.square().sum() / (2 * variance) - gates @ self.logit).item()

    def _best(self, gates: Tensor, violation: Tensor, variance: float) -> Tensor:
        """(0 to 2,) units that lower the cost most if they are flipped together; `gates`, `violation` are of `units`.

        The change by a pair is at least the sum of its two derivatives, since the Hessian is positive semidefinite. So
        one of them is negative, and the other no more than the least is below 0.
        """
        sign = 1 - 2 * gates
        slope = sign * (self.own * violation / variance - self.odds)
        steepest = slope.min()
        if steepest >= 0:
            return self.units[:0]
        near = torch.where(slope < -steepest)[0]
        slope, parts = slope[near], sign[near, None] * self.parts[near]
        alone, falling = slope + self.curvature[near] / (2 * variance), torch.where(slope < 0)[0]
        change = self.space.gram(parts[falling], parts).div_(variance).add_(alone[falling, None]).add_(alone)
        change[torch.arange(len(falling)), falling] = alone[falling]
        first, second = divmod(int(change.argmin()), len(near))
        if change[first, second] >= -1e-9 * (1 + self.curvature.max() / variance):  # or rounding would flip forever
            return self.units[:0]
        return self.units[near[[int(falling[first]), second]].unique()]


class ColumnSpace:
    """A space of vectors (H,), and what lies outside of it.

    Args:
        vectors: (H, K) orthonormal, of which the first N span the space; K >= N, or K = H.
        num_images: N.

    Attributes:
        basis: (H, n) orthonormal, of the space, or of what is outside where that is thinner and known.
        share: (H,) of a unit vector's square that lies outside.
    """

    def __init__(self, vectors: Tensor, num_images: int) -> None:
        units, known = vectors.shape
        self.is_outside = known == units and units < 2 * num_images
        self.basis = (vectors[:, num_images:] if self.is_outside else vectors[:, :num_images]).contiguous()
        within = self.basis.square().sum(1)
        self.share = within if self.is_outside else (1 - within).clamp_min(0)

    def outside(self, vector: Tensor) -> Tensor:
        """(H,) the part of a vector that lies outside."""
        part = self.basis @ (vector @ self.basis)
        return part if self.is_outside else vector - part

    def gram(self, one: Tensor, other: Tensor) -> Tensor:
        """Inner products outside of different units, each scaled: (n, n') of rows of the basis (n, N) and (n', N)."""
        return one @ other.T if self.is_outside else -(one @ other.T)
