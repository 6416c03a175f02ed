"""Gates of a single local step, which are 0 or 1: a discrete search.

Notation as in `analytic.leak`. Three sources of evidence determine each gate. (1) The last layer's update gives the
activation, with rounding noise. (2) `W1 f` gives the pre-activation, as accurately as the features are known. (3) A row
of `Delta = gates * errors` must lie in the column space of the first layer's update, which a single wrong gate violates
as long as there are more live units than images. The third is by far the sharpest, but it involves all gates of an
image, so two wrong ones can cancel: the search flips single gates and pairs, while the variance of the constraint falls
from what the first two sources leave open to the rounding noise.
"""

import torch
from torch import Tensor
from torch.special import log_ndtr

LEVELS = 8
"""Number of variances between the prior's and that of rounding."""
CANDIDATES = 512
"""Least certain units of an image among which flips are tried; bounds time and memory for wide layers."""


def binary_gates(
    rows: Tensor, weight: Tensor, errors: Tensor, activations: Tensor, width: int, iterations: int = 6
) -> tuple[Tensor, Tensor]:
    """Gates and features of a single step, estimated alternately until they stay the same.

    Args:
        rows: (H, r) summed gradient of the first layer, in an orthonormal basis of its row space.
        weight: (H, r) the layer's weight in that basis.
        errors: (N, H) back-propagated errors with every gate open.
        activations: (N, H) noisy, from the last layer's update.
        width: D, number of features, over which the rounding noise is spread.
        iterations: upper limit, of gates -> features -> gates.

    Returns:
        Gates (N, H) in {0, 1}, and features (N, r).
    """
    live = (rows != 0).any(1)
    found = torch.zeros_like(errors)
    rows, weight, errors, activations = rows[live], weight[live], errors[:, live], activations[:, live]
    vectors, singular, _ = torch.linalg.svd(rows, full_matrices=True)
    num_images, excess = len(errors), max(len(rows) - len(errors), 0)
    outside = vectors[:, num_images:]  # (live, excess)
    rounding = singular[num_images:].square().sum() / max(excess * (width - num_images), 1)
    resolved = 1e-12 * errors.square().mean()  # by float64

    noise = activations.clamp_max(0).square().sum(1, keepdim=True) / (activations < 0).sum(1, keepdim=True).clamp_min(1)
    noise = noise.sqrt().clamp_min(torch.finfo(torch.float32).eps * activations.abs().max())
    preactivations = torch.zeros_like(activations)
    spread = (2 * activations.square().mean(1, keepdim=True)).sqrt()  # half of the units are inactive
    gates = None
    for _ in range(iterations):
        logit = gate_logit(activations, noise, preactivations, spread)
        chance = logit.sigmoid()
        start = (chance > 0.5).to(rows)
        known = start if gates is None else gates
        features = torch.linalg.lstsq((known * errors).T, rows, driver="gelsd").solution
        floor = (rounding * torch.linalg.pinv(features @ features.T, hermitian=True).diagonal()).clamp_min(resolved)
        open_ = (chance * (1 - chance) * errors.square()) @ outside.square().sum(1) / max(excess, 1)
        ladder = floor[:, None] * (open_ / floor).clamp_min(1)[:, None] ** torch.linspace(1, 0, LEVELS + 1).to(rows)
        settled = torch.stack(
            [
                settle(outside * errors[image, :, None], logit[image], [start[image], known[image]], ladder[image])
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


def gate_logit(activations: Tensor, noise: Tensor, preactivations: Tensor, spread: Tensor) -> Tensor:
    """(N, H) log odds that a unit is active, from two noisy values of its pre-activation.

    Args:
        activations: (N, H) its positive part, with Gaussian noise.
        noise: (N, 1) standard deviation of that noise.
        preactivations: (N, H) the pre-activation itself, with Gaussian noise.
        spread: (N, 1) standard deviation of that noise.
    """
    total = torch.hypot(noise, spread)
    mean = (activations * spread**2 + preactivations * noise**2) / total**2
    open_ = (
        -((activations - preactivations) / total).square() / 2 - total.log() + log_ndtr(mean * total / noise / spread)
    )
    return open_ + (activations / noise).square() / 2 + noise.log() - log_ndtr(-preactivations / spread)


def settle(violation: Tensor, logit: Tensor, starts: list[Tensor], ladder: Tensor) -> Tensor:
    """(H,) most probable gates of one image: the better of a search with falling variance and one from known gates.

    Args:
        violation: (H, c) contribution of each gate to the violation of the constraint.
        logit: (H,) prior log odds of an active unit.
        starts: gates (H,) for the first search, and for the second, which uses the last variance only.
        ladder: falling variances of an entry of the violation.
    """
    descending, known = starts
    for variance in ladder.tolist():
        descending, cost = flip_gates(violation, logit, descending, variance)
    improved, other_cost = flip_gates(violation, logit, known, variance)
    return descending if cost <= other_cost else improved


def flip_gates(violation: Tensor, logit: Tensor, gates: Tensor, variance: float) -> tuple[Tensor, float]:
    """Greedily flip single gates and pairs until no flip lowers the cost; returns gates (H,) and their cost."""
    gates, total = gates.clone(), gates @ violation
    units = logit.abs().topk(min(CANDIDATES, len(logit)), largest=False).indices
    parts, odds = violation[units], logit[units]
    gram = parts @ parts.T / variance
    while True:
        sign = 1 - 2 * gates[units]
        alone = sign * (parts @ total / variance - odds) + gram.diagonal() / 2
        change = alone[:, None] + alone + sign[:, None] * gram * sign
        change.diagonal().copy_(alone)
        first, second = divmod(int(change.argmin()), len(units))
        if change[first, second] >= -1e-9 * (1 + gram.diagonal().max()):  # or rounding would flip forever
            return gates, (total.square().sum() / (2 * variance) - gates @ logit).item()
        for flipped in {first, second}:
            total = total + sign[flipped] * parts[flipped]
            gates[units[flipped]] += sign[flipped]
