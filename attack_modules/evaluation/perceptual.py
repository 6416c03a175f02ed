"""The perceptual distance LPIPS."""

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import AlexNet_Weights

from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import SettingError, in_short
from fl_lightning.storage import load_checkpoint


class Lpips:
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018, arXiv 1801.03924): perceptual distance of images, 0 = identical.

    Args:
        backbone: file of torchvision's AlexNet weights; the package `lpips` includes only its own linear layers.

    Raises:
        StorageError: the file cannot be read as a checkpoint.
        SettingError: the checkpoint is not torchvision's AlexNet.
    """

    FILE = Path(AlexNet_Weights.IMAGENET1K_V1.url).name

    def __init__(self, backbone: Path) -> None:
        from lpips import LPIPS  # most runs have no weights for it

        weights = load_checkpoint(backbone)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips uses torchvision arguments that are deprecated
            self.network = LPIPS(net="alex", pnet_rand=True, verbose=False)  # pnet_rand prevents a download
        slices = self.network.net  # keys `slice2.3.weight` correspond to torchvision's `features.3.weight`
        try:
            slices.load_state_dict({key: weights[f"features.{key.partition('.')[2]}"] for key in slices.state_dict()})
        except (KeyError, TypeError, RuntimeError) as error:
            raise SettingError(
                f"'{backbone}' does not hold torchvision's AlexNet ({in_short(error)}). Replace it by "
                f"{AlexNet_Weights.IMAGENET1K_V1.url}, or delete it to evaluate without LPIPS."
            ) from error

    @classmethod
    def if_available(cls) -> "Lpips | None":
        """Create LPIPS if AlexNet's weights are in torch.hub's checkpoint folder or in `checkpoints/`, else None.

        Nothing is downloaded. If the weights are missing, a warning is issued once per process.
        """
        folders = (Path(torch.hub.get_dir()) / "checkpoints", CHECKPOINTS)
        for folder in folders:
            if (folder / cls.FILE).exists():
                return cls(folder / cls.FILE)
        _warn_without_lpips(cls.FILE, *folders)
        return None

    @torch.no_grad()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Compute distances of image pairs: two tensors (N, 3 or 1, H, W) in [0, 1], at least 31 x 31 -> (N,)."""
        self.network.to(images.device)
        images, others = (x.expand(-1, 3, -1, -1) for x in (images, others))
        return self.network(images, others, normalize=True).flatten()


@functools.cache
def _warn_without_lpips(file: str, *folders: Path) -> None:
    warnings.warn(
        f"LPIPS is not computed: AlexNet's weights, '{file}', are neither in '{folders[0]}' nor in '{folders[1]}'. "
        f"Download {AlexNet_Weights.IMAGENET1K_V1.url} to one of these folders to enable it.",
        stacklevel=3,
    )
