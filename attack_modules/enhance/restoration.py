"""Any restoration network in a file, by way of the package `spandrel`, which knows some forty architectures."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.weights import read_weights
from fl_lightning.errors import SettingError
from fl_lightning.storage import StorageError


class Restoration(Enhancer):
    """Denoising, deblurring or super-resolution by a published network, with no download but the file itself.

    A network that enlarges is given the images reduced, where they were reconstructed that much smaller; otherwise its
    result is reduced.

    Args:
        weights: the network's file (.pth, .pt, .safetensors); its architecture is recognised by its names.
        chunk_size: images that are restored at once, which bounds memory.

    Raises:
        SettingError: `spandrel` is not installed.
        MissingFile: there is no such file.
        StorageError: no architecture fits it.
    """

    def __init__(self, weights: Path, chunk_size: int = 16) -> None:
        try:
            from spandrel import ImageModelDescriptor, ModelLoader  # an optional extra
        except ImportError as error:
            raise SettingError(
                "Restoration networks are read by the package `spandrel`, which is not installed. Run "
                "`pip install curious-client[restoration]`, or `pip install spandrel`."
            ) from error
        state = read_weights(weights, "where the network was published", ("params_ema", "params", "state_dict"))
        try:
            self.network = ModelLoader(device="cpu").load_from_state_dict(state)
        except Exception as error:  # whatever its architecture's constructor raises
            raise StorageError(
                f"'{weights}' holds no network that spandrel knows ({type(error).__name__}: {error}). Name a "
                "restoration network, for instance of ESRGAN's, SwinIR's or NAFNet's architecture."
            ) from error
        if not isinstance(self.network, ImageModelDescriptor) or self.network.output_channels not in (1, 3):
            raise SettingError(
                f"'{weights}' is a {type(self.network).__name__}, but one from image to image is needed."
            )
        self.network.eval()
        self.chunk_size = chunk_size

    @torch.no_grad()
    def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
        images, factor = reconstruction.images, self.network.scale
        self.network.to(images.device)
        reduce = factor > 1 and reconstruction.latent_downscale >= factor and not images.shape[-1] % factor
        restored = [images[:0]]
        for part in images.split(self.chunk_size):
            if len(part):
                seen = F.avg_pool2d(part, factor) if reduce else part
                seen = seen.mean(1, keepdim=True) if self.network.input_channels == 1 else seen.expand(-1, 3, -1, -1)
                restored.append(self._as(self.network(seen).float().clamp(0, 1), part))
        return torch.cat(restored)

    @staticmethod
    def _as(restored: Tensor, images: Tensor) -> Tensor:
        """Of the images' size and channels."""
        if restored.shape[-2:] != images.shape[-2:]:
            restored = F.interpolate(restored, images.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        return restored.mean(1, keepdim=True) if images.shape[1] == 1 else restored.expand(-1, 3, -1, -1)
