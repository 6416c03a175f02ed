"""Common interface of all enhancements: an attack's reconstruction in, images of the same size out."""

from abc import ABC, abstractmethod

from torch import Tensor

from attack_modules.attack import Reconstruction


class Enhancer(ABC):
    """Improves reconstructed images from the reconstruction alone, without access to the originals."""

    chunk_size: int = 16
    """Number of images enhanced at once; multiple processes distribute chunks of this size among themselves."""

    @abstractmethod
    def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
        """Enhance the images of a reconstruction.

        Args:
            reconstruction: images (N, C, H, W) in [0, 1] with labels (N,), upsampled by the factor `latent_downscale`
                after reconstruction (1: not upsampled).
            seed: seed of the enhancement's own randomness. The same seed gives the same images, and a chunk
                (`Reconstruction.part`) gives the same images alone as together with the others.

        Returns:
            (N, C, H, W) images in [0, 1], of the same number, size and order as the reconstructed ones.
        """
