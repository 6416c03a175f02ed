"""The contract of the readings of defended updates, one for each kind of defence: what they are given and return."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attack_modules.attack import AttackError
from fl_lightning.defenses import Defense


class UnreadableDefense(AttackError):
    """The update is not one in which this defence can be read."""


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a head in one round; C classes, N images.

    Attributes:
        gradient: (C, H) summed; (C, H + 1) with a bias.
        weight: before the round, of the same shape.
        labels: (N,) long.
        targets: (N, C) of each image, see `fl_lightning.loss`.
        probabilities: (C,) that are predicted for typical images.
        scale: by which updates were multiplied to give summed gradients.
    """

    gradient: Tensor
    weight: Tensor
    labels: Tensor
    targets: Tensor
    probabilities: Tensor
    scale: float


@dataclass(frozen=True)
class HeadRound:
    """What one round shows of a head of two linear layers, before its first layer is solved; H units, N images.

    Attributes:
        update: (H, D) summed gradient of the first layer; a bias is the last column.
        weight: (H, D) of the first layer half way through the local steps.
        activations: (N, H) of the hidden units, as the last layer's update shows them.
        errors: (N, H) back-propagated errors with every gate open.
        last: the last layer, of which these two are; None where they are all that is needed.
    """

    update: Tensor
    weight: Tensor
    activations: Tensor
    errors: Tensor
    last: LastLayer | None = None


@dataclass(frozen=True)
class Expected:
    """What is expected of the features before the first layer is solved.

    Attributes:
        features: (N, D).
        error: (N,) of these, relative to their size.
        of_images: whether they are of the images as they were reconstructed so far, or typical ones.
    """

    features: Tensor
    error: Tensor
    of_images: bool = False


@dataclass(frozen=True)
class DefendedFeatures:
    """The first layer of a defended update, solved.

    Attributes:
        features: (N, D), with the 1 of a bias as the last column.
        gated: (N, K) back-propagated errors, gates included, the units of all rounds side by side.
        uncertainty: (N,) expected error of the features relative to their true size; infinite where nothing is left.
        peers: (N,) long; 0 for all where nothing tells.
        residual: relative Frobenius norm of the update that the features leave unexplained.
        noise: standard deviation of independent noise in an entry of the update; None if it is not of this kind.
        weights: (N, D) in [0, 1] of the features' squared errors as images are made of them, where some are known
            better than others; None if all count alike.
    """

    features: Tensor
    gated: Tensor
    uncertainty: Tensor
    peers: Tensor
    residual: float
    noise: float | None = None
    weights: Tensor | None = None


class DefendedReading(ABC):
    """How the first layer's update is read under one kind of defence."""

    resolves: int = 0
    """How often, while images are reconstructed, their features make this reading better than it was."""
    most_unexplained: float = math.inf
    """Residual from which the plain reading is at least as good, since training is not as this one takes it."""
    noisy: bool = True
    """Whether features come out with noise, of the size of their uncertainty."""
    harm: float = 1.0
    """Factor by which errors of the features harm an image more than as much independent noise."""
    shows_rank: bool = True
    """Whether the rank of the update tells of the number of images; else it is that of the held classes."""
    single_step: bool = False
    """Whether it reads one local step of one round alone."""

    @classmethod
    @abstractmethod
    def against(cls, defenses: Sequence[Defense]) -> "DefendedReading | None":
        """The reading for these defences of the peers and the server; None if they do not ask for it."""

    def mixing(self, directions: Tensor, last: LastLayer) -> Tensor | None:
        """(N, N) share of each image, by columns, in each of those that were trained on; None if none are mixed.

        Args:
            directions: (H, N) orthonormal basis of the column space of the first layer's update.
            last: the last layer, with the targets of images that are not mixed.

        Raises:
            UnreadableDefense: images were mixed, but it does not show which.
        """
        return None

    @abstractmethod
    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        """Features of the images.

        Args:
            rounds: of the same images, oldest first.
            expected: of the features.
        """


@dataclass(frozen=True)
class ReadAgain:
    """Features of N images that were read once more.

    Attributes:
        features: (N, D), without the 1 of a bias.
        uncertainty: (N,) see `DefendedFeatures`.
        weights: (N, D) or None, likewise.
    """

    features: Tensor
    uncertainty: Tensor
    weights: Tensor | None = None


class Rereadable(ABC):
    """What was read under a defence, and can be read again.

    Attributes:
        reading: of the defence.
    """

    reading: DefendedReading

    @abstractmethod
    def again(self, expected: Expected) -> ReadAgain:
        """The features of the images.

        Args:
            expected: of the features.
        """


@dataclass(frozen=True)
class DefendedLayer(Rereadable):
    """A first layer that is solved under a defence, and can be solved again.

    Attributes:
        reading: of the defence.
        rounds: that it reads.
    """

    reading: DefendedReading
    rounds: Sequence[HeadRound]

    def solve(self, expected: Expected) -> DefendedFeatures:
        """Features of the images, see `DefendedReading.solve`; a bias's 1 is added to the expected ones here."""
        width = self.rounds[0].update.shape[1]
        ones = expected.features.new_ones(len(expected.features), width - expected.features.shape[1])
        return self.reading.solve(self.rounds, replace(expected, features=torch.cat([expected.features, ones], 1)))

    def again(self, expected: Expected) -> ReadAgain:
        found, width = self.solve(expected), expected.features.shape[1]
        weights = None if found.weights is None else found.weights[:, :width]
        return ReadAgain(found.features[:, :width], found.uncertainty, weights)
