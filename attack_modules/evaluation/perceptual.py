"""How different two images look to a network: LPIPS."""

import functools
import warnings
from pathlib import Path

import torch
from lpips import LPIPS
from torch import Tensor
from torchvision.models import AlexNet_Weights

from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import SettingError
from fl_lightning.storage import load_checkpoint


class Lpips:
    """LPIPS 0.1 over AlexNet (Zhang et al. 2018, arXiv 1801.03924): how different two images look, 0 = identical.

    Args:
        backbone: torchvision's AlexNet weights. The package `lpips` brings only its own small layers along.

    Raises:
        StorageError: the file is no checkpoint.
        SettingError: it is not AlexNet's.
    """

    FILE = Path(AlexNet_Weights.IMAGENET1K_V1.url).name

    def __init__(self, backbone: Path) -> None:
        weights = load_checkpoint(backbone)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips speaks to an older torchvision
            self.network = LPIPS(net="alex", pnet_rand=True, verbose=False)  # otherwise it would download
        slices = self.network.net  # its keys are `slice2.3.weight` where torchvision's are `features.3.weight`
        try:
            slices.load_state_dict({key: weights[f"features.{key.partition('.')[2]}"] for key in slices.state_dict()})
        except (KeyError, TypeError, RuntimeError) as error:
            raise SettingError(
                f"'{backbone}' does not hold torchvision's AlexNet ({error}). Replace it by "
                f"{AlexNet_Weights.IMAGENET1K_V1.url}, or delete it to go without LPIPS."
            ) from error

    @classmethod
    def if_available(cls) -> "Lpips | None":
        """LPIPS if AlexNet's weights are in torch.hub's checkpoint folder or in `checkpoints/`, or else None.

        Never downloads; without the weights it warns, once a process.
        """
        folders = (Path(torch.hub.get_dir()) / "checkpoints", CHECKPOINTS)
        for folder in folders:
            if (folder / cls.FILE).exists():
                return cls(folder / cls.FILE)
        _warn_without_lpips(cls.FILE, *folders)
        return None

    @torch.no_grad()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """(N, 3 or 1, H, W) pairs in [0, 1], at least 31 x 31 -> (N,) distances."""
        self.network.to(images.device)
        images, others = (x.expand(-1, 3, -1, -1) for x in (images, others))
        return self.network(images, others, normalize=True).flatten()


@functools.cache
def _warn_without_lpips(file: str, *folders: Path) -> None:
    warnings.warn(
        f"LPIPS is left out: AlexNet's weights, '{file}', are neither in '{folders[0]}' nor in '{folders[1]}'. "
        f"Download {AlexNet_Weights.IMAGENET1K_V1.url} into one of them to have it measured.",
        stacklevel=3,
    )
