"""What all enhancements share: they take what an attack ends with, and give images of the same size."""

from abc import ABC, abstractmethod

from torch import Tensor

from attack_modules.attack import Reconstruction


class Enhancer(ABC):
    """Makes better images of reconstructed ones, from those alone: no original is at hand."""

    chunk_size: int = 16
    """Images that are enhanced at a time. Several processes deal such chunks among them."""

    @abstractmethod
    def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
        """(N, C, H, W) images in [0, 1], as many, as large and in the same order as the reconstructed ones.

        Args:
            reconstruction: images (N, C, H, W) in [0, 1] with labels (N,), upsampled by `latent_downscale` (1: not at
                all) from what was reconstructed.
            seed: of the enhancement's own randomness; the same seed gives the same images, and a chunk alone
                (`Reconstruction.part`) what it gives among the others.
        """
