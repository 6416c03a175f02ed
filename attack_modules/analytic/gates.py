"""Gates, the share of the local steps in which a hidden unit was active for an image, and features given the gates."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CERTAIN = 1e-7
"""Variance of a gate up to which it cannot change by 1e-3."""


@dataclass(frozen=True)
class Gates:
    """Independent distributions of all gates: mean and variance (N, H) of the share of active steps."""

    mean: Tensor
    variance: Tensor


class GateRegression:
    """Estimates gates under the constraint that `gates * errors` lies in the column space of the layer's update.

    Args:
        rows: (H, r) the layer's summed gradient.
        num_images: its rank, N.
        rest: squared norm of what `rows` leaves of the gradient.
    """

    def __init__(self, rows: Tensor, num_images: int, rest: float = 0.0) -> None:
        vectors, singular, _ = torch.linalg.svd(rows, full_matrices=False)
        self.inside = vectors[:, :num_images]  # (H, N)
        self.num_constraints = len(rows) - self.inside.shape[1]
        live = int(rows.any(1).sum())
        spare = max(live - num_images, 1) * max(min(live, rows.shape[1]) - num_images, 1)
        #: variance of an entry of `rows` that a rank-N product cannot explain
        self.noise = (singular[num_images:].square().sum().item() + rest) / spare

    def posterior(self, prior: Gates, errors: Tensor, noise: Tensor) -> tuple[Gates, float]:
        """Posterior of the gates given the constraint, and the log evidence of the prior.

        Args:
            prior: independent Gaussian gates.
            errors: (N, H) back-propagated errors with every gate open.
            noise: (N,) variance to which the constraint holds for each image; raised where the prior allows no better.
        """
        if not self.num_constraints or prior.variance.max() <= CERTAIN:
            return prior, -math.inf
        noise = noise.clamp_min(1e-12 * errors.square().mean().item())  # what float64 resolves
        parts = [
            self._posterior(Gates(prior.mean[part], prior.variance[part]), errors[part], noise[part])
            for part in torch.arange(len(errors)).split(max(2**24 // self.inside.numel(), 1))  # bounds memory
        ]
        means, variances = ([getattr(gates, name) for gates, _ in parts] for name in ("mean", "variance"))
        return Gates(torch.cat(means), torch.cat(variances)), sum(evidence for _, evidence in parts)

    def _posterior(self, prior: Gates, errors: Tensor, noise: Tensor) -> tuple[Gates, float]:
        """`posterior` by least squares with each unit weighted, which takes N x N matrices only (Woodbury)."""
        gated, free = prior.mean * errors, prior.variance * errors**2
        violation = gated - gated @ self.inside @ self.inside.T
        noise = noise.clone()
        weight = torch.empty_like(free)  # of what a unit shows of the columns' coefficients
        left = torch.empty_like(free)
        factor, evidence = free.new_empty(len(errors), *self.inside.shape[1:] * 2), torch.empty_like(noise)
        raised = torch.arange(len(errors))
        for _ in range(3):
            used = noise.clone()  # that of images which are not raised stays the same
            new = used[raised, None] / (used[raised, None] + free[raised])
            factors = torch.linalg.cholesky(self._gram(new))
            pull = ((new * violation[raised]) @ self.inside)[..., None]
            rest = violation[raised] - torch.cholesky_solve(pull, factors)[..., 0] @ self.inside.T
            misfit = (new * rest.square()).sum(1) / used[raised]
            evidence[raised] = (
                -0.5 * (misfit + self.num_constraints * used[raised].log())
                + 0.5 * new.log().sum(1)
                - factors.diagonal(dim1=1, dim2=2).log().sum(1)
            )
            weight[raised], left[raised], factor[raised] = new, rest, factors
            more = misfit > self.num_constraints  # the prior allows no better
            noise[raised] *= (misfit / self.num_constraints).clamp_min(1)
            if not len(raised := raised[more]):
                break
        mean = prior.mean - prior.variance * errors * weight / used[:, None] * left
        leverage = self._leverage(torch.cholesky_inverse(factor))
        variance = prior.variance * weight * (1 + free * weight / used[:, None] * leverage)
        return Gates(mean, variance), evidence.sum().item()

    def _gram(self, weight: Tensor) -> Tensor:
        """(n, H) weights of units -> (n, N, N) gram matrices of the basis, without a copy of the basis for each."""
        count = self.inside.shape[1]
        gram = weight.new_empty(len(weight), count, count)
        for i in range(count):
            gram[:, i:, i] = gram[:, i, i:] = weight @ (self.inside[:, i:] * self.inside[:, i, None])
        return gram

    def _leverage(self, inverse: Tensor) -> Tensor:
        """(n, N, N) symmetric matrices -> (n, H) their quadratic forms of the basis' rows."""
        found = inverse.new_zeros(len(inverse), len(self.inside))
        for i in range(self.inside.shape[1]):
            twice = 2 * inverse[:, i, i:]
            twice[:, 0] /= 2  # the diagonal counts once
            found += twice @ (self.inside[:, i:] * self.inside[:, i, None]).T
        return found

    def best(self, prior: Callable[[float], Gates], errors: Tensor, noise: Tensor, width: float = 0.01) -> Gates:
        """Posterior under the prior of greatest evidence, by hill climbing over its width in factors of 2."""
        best, evidence = self.posterior(prior(width), errors, noise)
        start = width
        for factor in (2.0, 0.5):
            while 1e-5 < (trial := width * factor) < 1:
                gates, trial_evidence = self.posterior(prior(trial), errors, noise)
                if trial_evidence <= evidence:
                    break
                best, evidence, width = gates, trial_evidence, trial
            if width != start:
                break  # the other direction is where it came from
        return best


def regress_features(rows: Tensor, errors: Tensor, variance: Tensor, noise: float, iterations: int = 3) -> Tensor:
    """(N, r) features from `rows = errors^T features`, by least squares with each hidden unit weighted.

    Units weigh by the inverse of their residual variance, which is estimated iteratively. Features have a Gaussian
    prior around the images' mean, which matters only where there are nearly as many images as units.

    Args:
        rows: (H, r) summed gradient of the first layer.
        errors: (N, H) gated errors `Delta`.
        variance: (N, H) of its entries, from which the first weights follow.
        noise: variance of an entry of `rows`.
        iterations: of the weights.
    """
    count, live = len(errors), int(rows.any(1).sum())
    spread = rows.square().sum() / errors.square().sum() / rows.shape[1]
    eps = torch.finfo(rows.dtype).eps
    noise = noise + eps * rows.square().mean().item()
    residual = variance.sum(0) * spread
    identity = torch.eye(count).to(rows)
    for _ in range(iterations + 1):
        weight = (noise + residual).rsqrt()
        weighted = errors * weight
        gram = weighted @ weighted.T
        prior = (identity - 1 / count) / spread + count * eps * gram.trace() * identity
        factor = torch.linalg.cholesky(gram + prior)
        features = torch.cholesky_solve(weighted @ (rows * weight[:, None]), factor)
        spent = torch.cholesky_solve(gram, factor).trace()  # degrees of freedom of the fit
        residual = (rows - errors.T @ features).square().mean(1) / (1 - spent / live).clamp_min(1 / live)
        spread = (features - features.mean(0)).square().mean().clamp_min(eps * features.square().mean())
    return features


def probably_active(activations: Tensor) -> Tensor:
    """(N, H) probability that a unit was active in any step, given its noisy mean activation.

    True activations are not negative, so the negative values give each image's noise level.
    """
    noise = activations.clamp_max(0).square().sum(1, keepdim=True) / (activations < 0).sum(1, keepdim=True).clamp_min(1)
    noise = noise.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    standard = activations / noise
    log_on = torch.special.log_ndtr(standard) - mean_activation(activations).log()
    log_off = -standard.square() / 2 - noise.log() - math.log(2 * math.pi) / 2
    return torch.sigmoid(log_on - log_off)


def gates_of_activations(activations: Tensor, width: float) -> Gates:
    """Gates from mean activations (N, H) alone.

    A unit with a large activation was active in all steps, one near zero in some. `width` is what counts as near, in
    units of the image's mean activation.
    """
    active = probably_active(activations)
    share = -torch.expm1(-activations.clamp_min(0) / (width * mean_activation(activations)))
    return Gates(active * share, active * share * (1 - share) / 3 + share.square() * active * (1 - active))


def mean_activation(activations: Tensor) -> Tensor:
    """(N, 1) mean of each image's positive activations; nearly 0 for an image without any (one that was misread)."""
    total, count = activations.clamp_min(0).sum(1, keepdim=True), (activations > 0).sum(1, keepdim=True).clamp_min(1)
    return (total / count).clamp_min(torch.finfo(activations.dtype).tiny)
