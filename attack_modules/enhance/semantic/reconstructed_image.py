"""Data module for `fit` with a `SemanticEnhancer`: one reconstructed image from a file."""

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from fl_lightning.data.images import PathLike, read_image, read_size
from fl_lightning.errors import SettingError


class ReconstructedImage(LightningDataModule):
    """Loads one image file to be enhanced by `fit`.

    Args:
        image: image file of any size, cropped to its central square. A grey image stays grey; the model adds colours.
        latent_downscale: factor by which the image was upsampled after reconstruction; 1 if it was not.

    Raises:
        SettingError: the image cannot be read, or `latent_downscale` is not between 1 and the image's side in pixels.
    """

    def __init__(self, image: PathLike, latent_downscale: int = 1) -> None:
        super().__init__()
        size, channels = read_size(image)
        if latent_downscale < 1 or latent_downscale > size:
            raise SettingError(
                f"`data.latent_downscale` is {latent_downscale}, but '{image}' has {size} pixels per side. Give a "
                f"number from 1 to {size}; 1 for an image that was not upsampled."
            )
        self.latent_downscale = latent_downscale
        self.image = read_image(image, size, channels).float() / 255

    def train_dataloader(self) -> DataLoader:
        """One item per optimisation step."""
        return DataLoader(range(max(self.trainer.max_steps, 1)), batch_size=None)
