"""Common interface of all enhancements: an attack's reconstruction in, images of the same size out."""

from abc import ABC, abstractmethod

from torch import Tensor

from attack_modules.attack import Reconstruction
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageShape


class Enhancer(ABC):
    """Improves reconstructed images from the reconstruction alone, without access to the originals."""

    chunk_size: int = 16
    """Number of images enhanced at once; multiple processes distribute chunks of this size among themselves."""

    def check(self, image_shape: ImageShape, num_classes: int | None) -> None:
        """Refuse images or classes that this enhancement does not support; called before an attack starts.

        Args:
            image_shape: (C, H, W) of an image.
            num_classes: number of classes of the attacked model; None if unknown.

        Raises:
            SettingError: the images are neither RGB nor grey, or the enhancement needs other images or classes.
        """
        if image_shape[0] not in (1, 3):
            raise SettingError(
                f"{type(self).__name__} enhances RGB or grey images, but these have {image_shape[0]} channels. Leave "
                "the enhancement out (`--postprocess none`)."
            )

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
