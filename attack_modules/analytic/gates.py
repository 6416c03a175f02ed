"""Gates, the share of the local steps in which a hidden unit was active for an image, and features given the gates."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CERTAIN = 1e-7
"""Variance of a gate up to which it cannot change by 1e-3."""
NEGLIGIBLE = 1e-4
"""Variance of `gate * error` over that of the constraint up to which a gate stays what its prior says."""
ENTRIES = 2**22
"""Of matrices of units that are held at once."""


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

    def best(self, prior: Callable[[float], Gates], errors: Tensor, noise: Tensor, width: float = 0.01) -> Gates:
        """Posterior under the prior of greatest evidence, by hill climbing over its width in factors of 2."""
        best = prior(width)
        used, evidence = self.evidence(best, errors, noise)
        start = width
        for factor in (2.0, 0.5):
            while 1e-5 < (trial := width * factor) < 1:
                gates = prior(trial)
                trial_used, trial_evidence = self.evidence(gates, errors, noise)
                if trial_evidence <= evidence:
                    break
                best, used, evidence, width = gates, trial_used, trial_evidence, trial
            if width != start:
                break  # the other direction is where it came from
        return self.posterior(best, errors, used)

    def evidence(self, prior: Gates, errors: Tensor, noise: Tensor) -> tuple[Tensor, float]:
        """The variances to which the constraint holds, and the log evidence of the prior with them.

        Args:
            prior: independent Gaussian gates.
            errors: (N, H) back-propagated errors with every gate open.
            noise: (N,) variance to which the constraint holds for each image; raised where the prior allows no better.
        """
        if self._is_certain(prior):
            return noise, -math.inf
        noise = noise.clamp_min(1e-12 * errors.square().mean().item())  # what float64 resolves
        used, evidence = noise.clone(), torch.empty_like(noise)
        for part, solver in self._solvers(prior, errors, noise):
            raised = torch.arange(len(part))
            for _ in range(3):
                images = part[raised]
                used[images] = noise[images]
                misfit, spread = solver.misfit(used[images], raised)
                evidence[images] = -0.5 * (misfit + self.num_constraints * used[images].log()) - spread
                noise[images] *= (misfit / self.num_constraints).clamp_min(1)
                raised = raised[misfit > self.num_constraints]  # the prior allows no better
                if not len(raised):
                    break
        return used, evidence.sum().item()

    def posterior(self, prior: Gates, errors: Tensor, noise: Tensor) -> Gates:
        """Posterior of the gates given the constraint, which holds to the variances (N,) of `evidence`."""
        if self._is_certain(prior):
            return prior
        moved, left = torch.zeros_like(errors), torch.ones_like(errors)
        for part, solver in self._solvers(prior, errors, noise):
            moved[part], left[part] = solver.solution(noise[part])
        return Gates(prior.mean + prior.variance.sqrt() * errors.sign() * moved, prior.variance * left)

    def _is_certain(self, prior: Gates) -> bool:
        return not self.num_constraints or prior.variance.max().item() <= CERTAIN

    def _solvers(self, prior: Gates, errors: Tensor, noise: Tensor) -> Iterator[tuple[Tensor, "_Images | _Units"]]:
        """Some images at a time, which bounds memory, and what solves for their gates with fewest operations."""
        gated, root = prior.mean * errors, prior.variance.sqrt() * errors.abs()
        excess = root / noise[:, None].sqrt()
        counts = (excess.square() > NEGLIGIBLE).sum(1).clamp_min(1)
        units, images = self.inside.shape
        if units**2 > ENTRIES or counts.max() ** 3 > 3 * units * images**2:
            for part in torch.arange(len(errors)).split(max(4 * ENTRIES // self.inside.numel(), 1)):
                yield part, _Images(self.inside, root[part], self._outside(gated[part]))
            return
        for part in counts.argsort().split(max(ENTRIES // int(counts.max()) ** 2, 1)):
            uncertain = excess[part].topk(int(counts[part].max())).indices
            yield part, _Units(self._projector, root[part], self._outside(gated[part]), uncertain)

    def _outside(self, vectors: Tensor) -> Tensor:
        """The part of (n, H) vectors that lies outside of the column space."""
        return vectors - vectors @ self.inside @ self.inside.T

    @cached_property
    def _projector(self) -> Tensor:
        """(H, H) matrix of the same."""
        return torch.eye(len(self.inside)).to(self.inside) - self.inside @ self.inside.T


@dataclass
class _Images:
    """Solves for the gates of n images by least squares with each unit weighted, with N x N matrices (Woodbury).

    Attributes:
        inside: (H, N) orthonormal basis of the column space.
        root: (n, H) standard deviations of `gates * errors`.
        violation: (n, H) what of its mean lies outside of the column space.
    """

    inside: Tensor
    root: Tensor
    violation: Tensor

    def misfit(self, noise: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        """Of `some` images: (m,) squared misfit to constraint and prior, and half the log determinant of both.

        Args:
            noise: (m,) variance to which the constraint holds.
            some: (m,) indices of images.
        """
        weight, rest, factor = self._weighted(noise, some)
        misfit = (weight * rest.square()).sum(1) / noise
        return misfit, factor.diagonal(dim1=1, dim2=2).log().sum(1) - 0.5 * weight.log().sum(1)

    def solution(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(n, H) change of `gates * errors` by standard deviations, and share of the variance that is left."""
        weight, rest, factor = self._weighted(noise, torch.arange(len(noise)))
        gain = self.root * weight / noise[:, None]
        leverage = self._leverage(torch.cholesky_inverse(factor))
        return -gain * rest, weight * (1 + self.root * gain * leverage)

    def _weighted(self, noise: Tensor, some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (m, H) of what units show of the columns' coefficients, what these leave, and a Cholesky factor."""
        violation = self.violation[some]
        weight = noise[:, None] / (noise[:, None] + self.root[some].square())
        factor = torch.linalg.cholesky(self._gram(weight))
        pull = ((weight * violation) @ self.inside)[..., None]
        return weight, violation - torch.cholesky_solve(pull, factor)[..., 0] @ self.inside.T, factor

    def _gram(self, weight: Tensor) -> Tensor:
        """(m, H) weights of units -> (m, N, N) gram matrices of the basis, without a copy of the basis for each."""
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


class _Units:
    """Does the same as `_Images`, with K x K matrices of the units whose gates are uncertain beside the noise.

    Args:
        projector: (H, H) onto what lies outside of the column space.
        root, violation: as of `_Images`.
        units: (n, K) indices of these units.
    """

    def __init__(self, projector: Tensor, root: Tensor, violation: Tensor, units: Tensor) -> None:
        self.whole = violation.square().sum(1)
        self.shape, self.units, own = root.shape, units, root.gather(1, units)
        self.outside = projector[units[:, :, None], units[:, None, :]].mul_(own[:, :, None]).mul_(own[:, None, :])
        self.diagonal = self.outside.diagonal(dim1=1, dim2=2).clone()
        self.pull = own * violation.gather(1, units)

    def misfit(self, noise: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        factor, explained = self._factors(noise, some)
        misfit = (self.whole[some] - explained.square().sum(1)) / noise
        return misfit, (factor.diagonal(dim1=1, dim2=2).square() / noise[:, None]).log().sum(1) / 2

    def solution(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        factor, explained = self._factors(noise, torch.arange(len(noise)))
        moved = torch.linalg.solve_triangular(factor.mT, explained[..., None], upper=True)[..., 0]
        left = noise[:, None] * torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
        change, share = self.pull.new_zeros(self.shape), self.pull.new_ones(self.shape)
        return change.scatter_(1, self.units, -moved), share.scatter_(1, self.units, left)

    def _factors(self, noise: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        """(m, K, K) Cholesky factors of the precision times the noise, in standard deviations of the prior, and (m, K)
        what they leave of the pull: its square is what the units explain of the violation's.
        """
        outside = self.outside if len(some) == len(self.outside) else self.outside[some]
        outside.diagonal(dim1=1, dim2=2).copy_(self.diagonal[some] + noise[:, None])
        factor = torch.linalg.cholesky(outside)
        return factor, torch.linalg.solve_triangular(factor, self.pull[some][..., None], upper=False)[..., 0]


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
