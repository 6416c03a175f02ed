"""The data of `fit` with a `SemanticEnhancer`: one reconstructed image in a file."""

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from fl_lightning.data.images import PathLike, read_image, read_size
from fl_lightning.errors import SettingError


class ReconstructedImage(LightningDataModule):
    """One image in a file, to be enhanced by `fit`.

    Args:
        image: the file, of any size; its centre square is taken. A grey file stays grey: the colours are the model's.
        latent_downscale: the image was reconstructed this much smaller and upsampled, 1 if it was not.
        seed: is not used; the command line sets it for all data.
    """

    def __init__(self, image: PathLike, latent_downscale: int = 1, seed: int = 0) -> None:
        super().__init__()
        size, channels = read_size(image)
        if latent_downscale < 1 or latent_downscale > size:
            raise SettingError(
                f"`data.latent_downscale` is {latent_downscale}, but '{image}' has {size} pixels a side. Give a "
                "number from 1 to that, 1 for an image that was not upsampled."
            )
        self.latent_downscale = latent_downscale
        self.image = read_image(image, size, channels).float() / 255

    def train_dataloader(self) -> DataLoader:
        """One item for each step."""
        return DataLoader(range(max(self.trainer.max_steps, 1)), batch_size=None)
