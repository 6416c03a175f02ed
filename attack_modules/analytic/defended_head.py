"""What a reading of a defended head is given, and what it returns: the contract of one reading for each kind of defence."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadRound:
    """What one round shows of a head of two linear layers, before its first layer is solved; H units, N images.

    Attributes:
        update: (H, D) summed gradient of the first layer; a bias is the last column.
        weight: (H, D) of the first layer half way through the local steps.
        activations: (N, H) of the hidden units, as the last layer's update shows them.
        errors: (N, H) back-propagated errors with every gate open.
    """

    update: Tensor
    weight: Tensor
    activations: Tensor
    errors: Tensor


@dataclass(frozen=True)
class DefendedFeatures:
    """The first layer of a defended update, solved.

    Attributes:
        features: (N, D), with the 1 of a bias as the last column.
        gated: (N, K) back-propagated errors, gates included, the units of all rounds side by side.
        uncertainty: (N,) expected error of the features relative to their true size; infinite where nothing is left.
        peers: (N,) long; 0 for all where nothing tells.
    """

    features: Tensor
    gated: Tensor
    uncertainty: Tensor
    peers: Tensor


class DefendedReading(ABC):
    """How the first layer's update is read under one kind of defence."""

    @abstractmethod
    def solve(self, rounds: Sequence[HeadRound], features: Tensor | None = None) -> DefendedFeatures:
        """Features of the images.

        Args:
            rounds: of the same images, oldest first.
            features: (N, D) an estimate, as from images that were reconstructed meanwhile.
        """
