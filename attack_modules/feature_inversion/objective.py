"""What feature inversion minimises: relative changes of the feature error and of priors; and how it ranks iterates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attack_modules.feature_inversion.soft_pooling import softened
from attack_modules.priors import Prior, annealed
from fl_lightning.models import ImageClassifier

ERROR_FLOOR = 1e-10
"""Added to the feature error E before its logarithm: float32 resolves no less."""
LEAST_SIZE = 1e-10
"""Least squared norm of features: an image without any has a large error, but a finite one."""
PRIOR_FLOOR = 1 / 255
"""Added to the prior P before its logarithm: a total variation of one grey level. Without it, flat images would win."""
EXPLAINS = 0.1
"""Share of a grey image's E below which an iterate's P counts in its rank, where the start is grey. Those above show
too little of the features, and would win by being flat."""
UNEXPLAINED = 1e3
"""Added to the rank of those: more than any logarithm of E and P."""
PRIOR_OF_NOISE = 1.0
"""Weight of P beside E at the last step, over the relative noise of the features. Measured: 0.7 and 1.5 are as good."""
EARLY = 4.0
"""Factor of that weight at the first step."""


@dataclass(frozen=True)
class Objective:
    """`log E + balance * log P` of each image, with a limit on the weight of P, see `FeatureInversion`.

    Attributes:
        model: whose features are inverted.
        priors: penalties whose sum is P.
        balance: weight of the relative change of P beside that of E.
        prior_limit: upper limit of the weight of P beside E at the first and at the last step, geometric between.
        softness: of max pooling's gradient at the first and at the last step, geometric between.
        scale: other than 1, the features' scale is not known, and images may have them at any.
        grey: (1, D) features of a grey image, where images start as such; else None.
    """

    model: ImageClassifier
    priors: Sequence[Prior]
    balance: float
    prior_limit: tuple[float, float]
    softness: tuple[float, float]
    scale: float
    grey: Tensor | None

    def losses(
        self, images: Tensor, features: Tensor, step: int, steps: int, noise: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(n,) losses to descend on for images (n, C, H, W), and (n, 2) their E, and the rank of iterates.

        Args:
            images: of which the features are sought.
            features: (n, D) that they should have.
            step: of the optimisation, in which the weight of P falls.
            steps: of all.
            noise: (n,) relative size of the noise in `features`, in proportion to which P weighs; None without.
            weights: (n, D) see `distance`.
        """
        with softened(self.model, annealed(self.softness, step, steps)):
            error = self.error(images, features, weights)
        limit = annealed(self.prior_limit, step, steps)
        if noise is not None:
            final = (PRIOR_OF_NOISE * noise).clamp_min(self.prior_limit[1])
            limit = (final * EARLY ** (1 - step / max(steps - 1, 1))).clamp_min(limit)
        with torch.autocast(images.device.type, enabled=False):  # differences of neighbouring pixels are small
            prior = sum((prior.weight * prior(images) for prior in self.priors), torch.zeros_like(error))
        scale = error.detach() + ERROR_FLOOR
        tiny = torch.finfo(prior.dtype).tiny  # a flat image has no variation to divide by
        weight = (self.balance * scale / prior.detach().clamp_min(tiny)).clamp(max=limit)
        loss = (error + weight * prior) / scale  # its gradient is that of log E + balance * log P
        rank = scale.log() + self.balance * (prior + PRIOR_FLOOR).log() if noise is None else error + final * prior
        if noise is None and self.grey is not None:
            grey = self.distance(self.grey.expand_as(features), features, weights)
            rank = torch.where(error < EXPLAINS * grey, rank, UNEXPLAINED + scale.log())
        return loss, torch.stack([error, rank], 1).detach()

    def error(self, images: Tensor, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """(N,) relative squared distance of the images' features to `features` (N, D), at any scale if that is off.

        Squares of features count as much as their `weights` (N, D) in [0, 1]; None for 1.
        """
        return self.distance(self.model.embed(images), features, weights)

    def distance(self, shown: Tensor, features: Tensor, weights: Tensor | None) -> Tensor:
        """(N,) the same of the features (N, D) that images have."""
        if weights is not None:
            root = weights.sqrt()
            shown, features = shown * root, features * root
        if self.scale != 1:
            fitting = (shown * features).sum(1) / shown.square().sum(1).clamp_min(LEAST_SIZE)
            shown = shown * fitting.detach()[:, None]
        return (shown - features).square().sum(1) / features.square().sum(1).clamp_min(LEAST_SIZE)
