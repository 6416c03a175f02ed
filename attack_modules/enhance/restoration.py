"""Image restoration by published networks, loaded by the package `spandrel` (about forty architectures)."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.weights import read_weights
from fl_lightning.errors import SettingError, in_short
from fl_lightning.storage import StorageError


class Restoration(Enhancer):
    """Denoises, deblurs or super-resolves images with a published network; only its weights file is needed.

    A super-resolution network receives images downsampled by its scale factor if they were upsampled by at least that
    factor after reconstruction (`latent_downscale`). Otherwise its output is downsampled to the size of the images.

    Args:
        weights: weights file (.pth, .pt, .safetensors); the architecture is inferred from the tensor names.
        chunk_size: number of images restored at once, which bounds memory.

    Raises:
        SettingError: `spandrel` is not installed, or the network does not map images to images.
        MissingFile: the weights file does not exist.
        StorageError: the file cannot be read, or no supported architecture fits it.
    """

    def __init__(self, weights: Path, chunk_size: int = 16) -> None:
        try:
            from spandrel import ImageModelDescriptor, ModelLoader  # optional dependency
        except ImportError as error:
            raise SettingError(
                "Restoration networks are loaded by the package `spandrel`, which is not installed. Run "
                "`pip install spandrel`."
            ) from error
        state = read_weights(weights, "the publisher of the network", ("params_ema", "params", "state_dict"))
        try:
            self.network = ModelLoader(device="cpu").load_from_state_dict(state)
        except Exception as error:  # architecture constructors raise many exception types
            raise StorageError(
                f"'{weights}' holds no network that spandrel supports ({in_short(error)}). Give the "
                "weights of a restoration network, for example ESRGAN, SwinIR or NAFNet."
            ) from error
        channels = {self.network.input_channels, self.network.output_channels}
        if not isinstance(self.network, ImageModelDescriptor) or not channels <= {1, 3}:
            raise SettingError(
                f"'{weights}' holds a {type(self.network).__name__} from {self.network.input_channels} to "
                f"{self.network.output_channels} channels, but `Restoration` needs an image-to-image network of RGB or "
                "grey images. Give the weights of such a network."
            )
        self.network.eval()
        self.chunk_size = chunk_size

    @torch.no_grad()
    def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
        images, factor = reconstruction.images, self.network.scale
        self.network.to(images.device)
        self.check(images.shape[1:], reconstruction.num_classes)
        divisible = all(side % factor == 0 for side in images.shape[-2:])
        reduce = factor > 1 and reconstruction.latent_downscale >= factor and divisible
        restored = [images[:0]]
        for part in images.split(self.chunk_size):
            if len(part):
                seen = F.avg_pool2d(part, factor) if reduce else part
                seen = seen.mean(1, keepdim=True) if self.network.input_channels == 1 else seen.expand(-1, 3, -1, -1)
                restored.append(self._as(self.network(seen).float().clamp(0, 1), part))
        return torch.cat(restored)

    @staticmethod
    def _as(restored: Tensor, images: Tensor) -> Tensor:
        """Convert network output to the size and channels of `images`."""
        if restored.shape[-2:] != images.shape[-2:]:
            restored = F.interpolate(restored, images.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        return restored.mean(1, keepdim=True) if images.shape[1] == 1 else restored.expand(-1, 3, -1, -1)
