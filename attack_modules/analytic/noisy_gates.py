"""Gates and features where noise lies on the first layer's update: both are estimated with their uncertainty.

Notation as in `analytic.leak`. The update of hidden unit h is `Z_h = sum_n gate_nh errors_nh f_n`, with noise of
variance `sigma_h^2` in each of its D entries: Gaussian noise, or what rounding leaves. Three sources tell of a gate:
the last layer's update shows the activation, `W1 f` the pre-activation, and a regression of `Z_h` on the features that
all other units show gives `gate_nh errors_nh` itself. None is sharp under noise, so gates are probabilities, the
features their posterior mean, and both are estimated alternately (expectation maximisation). Nothing has to be known of
the noise: its size in each unit is what the features leave unexplained there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attack_modules.analytic.binary_gates import gate_logit
from attack_modules.analytic.defended_head import DefendedFeatures, DefendedReading, Expected, HeadRound
from fl_lightning.defenses import DPSGD, Defense, DPFedAvg, GaussianNoise, LocalDP, Quantization

ITERATIONS = 12
COARSE = 6
"""Bits of an entry up to which rounding is noise that asks for this reading."""
DEPENDENT = 2.0
"""Error of the features over what independent noise would make it, at 4 bits. Measured: 1.7."""
LEAST_NOISE = 0.02
"""Least noise of an activation as a share of the rms: classes that are not held are left out."""
MIXED = 0.2
"""Error of a regressed gate beside noise, since features under wrong gates are mixed with each other."""
SURE = 3.0
"""Log odds from which a gate is surely open."""
FIRST_NOISE = 0.2
"""The same before anything is known."""
LEAST_GRAM = 1e-3
"""Share of the features' mean square that is added to a Gram matrix, and least share of a gate's variance."""


@dataclass(frozen=True)
class NoisyFeatures:
    """Posterior of features and gates, the hidden units of all rounds side by side: K = R * H.

    Attributes:
        features: (N, D).
        gates: (N, K) probability that a unit is active.
        errors: (N, K) back-propagated errors with every gate open.
        variance: (N,) of each entry of the features.
        noise: (K,) variance of an entry of each unit's update.
    """

    features: Tensor
    gates: Tensor
    errors: Tensor
    variance: Tensor
    noise: Tensor

    @property
    def uncertainty(self) -> Tensor:
        """(N,) expected error of the features relative to their true size; infinite where they are all noise."""
        noise = self.variance * self.features.shape[1]
        size = self.features.square().sum(1) - noise
        return torch.where(size > 0, (noise / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt(), torch.inf)


class NoisyGates(DefendedReading):
    """Reads updates on which noise lies: Gaussian noise, or what coarse rounding leaves.

    Args:
        dependent: whether the noise depends on the entries that it lies on, as of rounding to the nearest.
    """

    def __init__(self, dependent: bool = False) -> None:
        self.optimism = DEPENDENT if dependent else 1.0

    @classmethod
    def against(cls, defenses: Sequence[Defense]) -> "NoisyGates | None":
        if any(isinstance(defense, Quantization) and defense.bits <= COARSE for defense in defenses):
            return cls(dependent=True)
        noisy = (GaussianNoise, LocalDP, DPFedAvg, DPSGD)
        return cls() if any(isinstance(defense, noisy) for defense in defenses) else None

    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        found = noisy_gates(rounds)
        size = torch.cat([seen.update.square().mean(1) for seen in rounds]).mean()
        return DefendedFeatures(
            features=found.features,
            gated=found.gates * found.errors,
            uncertainty=self.optimism * found.uncertainty,
            peers=torch.zeros(len(found.features), dtype=torch.long),
            residual=(found.noise.mean() / size).sqrt().item(),
            noise=found.noise.mean().sqrt().item(),
        )


def noisy_gates(rounds: Sequence[HeadRound], iterations: int = ITERATIONS) -> NoisyFeatures:
    """Features and gates of one local step, or of several as if each gate kept its mean.

    Args:
        rounds: of the same images, each with noise of its own, which averages out.
        iterations: of the alternation.
    """
    update, parts = [seen.update for seen in rounds], [len(seen.update) for seen in rounds]
    errors = torch.cat([seen.errors for seen in rounds], 1).double()
    activations = torch.cat([seen.activations for seen in rounds], 1).double()
    size = torch.cat([rows.square().sum(1) for rows in update]).double()  # (K,)
    width, live = update[0].shape[1], size > 0
    least = torch.finfo(torch.float32).eps * size.max() / width
    noise = torch.cat([unexplained(rows.double(), len(errors)) for rows in update]).clamp_min(least)
    floor = noise / 2
    largest = activations.square().mean(1, keepdim=True).sqrt()
    lowest = activation_noise(activations).maximum(LEAST_NOISE * largest)
    seen_noise, spread = lowest.maximum(FIRST_NOISE * largest), 2**0.5 * largest
    pre, evidence = torch.zeros_like(activations), torch.zeros_like(activations)
    strength = (size.sum() / errors.square().sum() / width).expand(len(errors), 1)  # mean square of a feature
    steep = torch.cat([seen.weight.square().sum(1) for seen in rounds]).double().mean()
    for step in range(iterations):
        prior = gate_logit(activations, seen_noise, pre, spread)
        gates, open_ = torch.sigmoid(prior + evidence), prior > SURE
        gated = gates * errors
        weight = live / (noise + (gates * (1 - gates) * errors.square() * strength).sum(0))
        covariance = torch.linalg.inv((gated * weight) @ gated.T)
        pulls = (gated * weight).split(parts, 1)
        features = covariance @ sum(pull.to(rows) @ rows for pull, rows in zip(pulls, update, strict=True)).double()
        shown = torch.cat([rows @ features.to(rows).T for rows in update]).double().T  # (N, K)
        gram = features @ features.T
        moved = covariance @ gated * weight
        own = size - (gated * shown).sum(0)
        left = own - (gated * (shown - gram @ gated)).sum(0)
        leverage = (gated * moved).sum(0).clamp(0, 1 - 1 / len(live))
        strength = gram.diagonal()[:, None] / width
        guessed = (gates * (1 - gates) * errors.square() * strength).sum(0)
        noise = (left / (1 - leverage) / width - guessed).clamp_min(least).maximum(floor)
        alone = shown - moved / (1 - leverage) * own  # inner products with features that the other units show
        found = gate_evidence(errors, gates, open_, alone, gram, covariance * width, noise)
        evidence = found if step == 0 else (evidence + found) / 2
        pre = torch.cat([features.to(seen.weight) @ seen.weight.T for seen in rounds], 1).double()
        spread = (covariance.diagonal()[:, None] * steep).sqrt().maximum(lowest / 10)
        sure = gates > 0.9
        mismatch = ((pre - activations).square() * sure).sum(1, keepdim=True) / sure.sum(1, keepdim=True).clamp_min(1)
        seen_noise = (mismatch - spread.square()).clamp_min(0).sqrt().maximum(lowest)
    return NoisyFeatures(features, gates, errors, covariance.diagonal(), noise)


def unexplained(rows: Tensor, count: int) -> Tensor:
    """(H,) variance of an entry of each row of (H, D) outside the space of the `count` leading directions."""
    size = rows.square().sum(1)
    unit = rows / size.sqrt().clamp_min(torch.finfo(size.dtype).tiny)[:, None]
    values, vectors = torch.linalg.eigh(unit @ unit.T)
    share = (1 - (vectors.square() * values)[:, -count:].sum(1)).clamp(0, 1)
    return size * share / rows.shape[1]


def activation_noise(activations: Tensor) -> Tensor:
    """(N, 1) standard deviation of the noise of activations (N, K), from the negative ones, which none is."""
    negative = activations.clamp_max(0)
    return (negative.square().sum(1, keepdim=True) / (negative < 0).sum(1, keepdim=True).clamp_min(1)).sqrt()


def gate_evidence(
    errors: Tensor, gates: Tensor, open_: Tensor, shown: Tensor, gram: Tensor, spread: Tensor, noise: Tensor
) -> Tensor:
    """(N, K) log odds of an open gate, from the inner products of a unit's update with all features.

    The other gates of the unit count as Gaussian with their mean and variance.

    Args:
        errors: (N, K) with every gate open.
        gates: (N, K) probabilities.
        open_: (N, K) bool: gates that are open by all other evidence, which show what an open gate looks like here:
            features that are noisy, or entries that are rounded towards 0, shrink it.
        shown: (N, K) inner products of a unit's update with features that do not depend on it.
        gram: (N, N) of the features.
        spread: (N, N) expected inner products of the features' errors.
        noise: (K,) variance of an entry of each update.
    """
    values, vectors = torch.linalg.eigh(gram - spread)
    true = (vectors * values.clamp_min(0)) @ vectors.T  # Gram matrix of the true features
    mean, variance = (gates * errors).T, (gates * (1 - gates) * errors.square()).T  # (K, N)
    floor = LEAST_GRAM * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    inner = (true * variance[:, None]) @ true + noise[:, None, None] * (true + spread + floor)
    solved = torch.linalg.solve(
        inner, torch.cat([true.expand(len(inner), -1, -1), (shown.T - mean @ true)[..., None]], 2)
    )
    slope = (true * solved[..., :-1].mT).sum(2)  # (K, N)
    pull = (true @ solved[..., -1:])[..., 0]
    alone = 1 / (1 - variance * slope).clamp_min(LEAST_GRAM)
    slope, pull = slope * alone, (pull + slope * mean) * alone
    errors = errors.T * ((pull * errors.T * open_.T).sum(0) / (slope * errors.T.square() * open_.T).sum(0)).clamp(0, 1)
    blurred = 1 + MIXED**2 * errors.square() * slope
    return ((pull * errors - slope * errors.square() / 2) / blurred).nan_to_num(0.0).T
