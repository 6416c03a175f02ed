"""ROG's enhancement (Yue et al. 2023, USENIX Security), the baseline of the paper (arXiv 2410.04661)."""

from pathlib import Path

import torch
from scipy.io import loadmat
from torch import Tensor
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.rog.networks import NUM_CLASSES, Generator, RogDenoiser
from attack_modules.enhance.rog.usrnet import USRNet
from attack_modules.weights import load_strictly, read_weights
from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import MissingFile, SettingError, in_short
from fl_lightning.models import ImageShape
from fl_lightning.storage import StorageError

FACTOR = 4
"""Ratio of the image's side length to that of ROG's reconstructions."""
MULTIPLE = 8 * FACTOR
"""Height and width of an image must be multiples of this: the denoiser halves the downsampled image three times."""
NOISE = 0.01
"""Noise level that USRNet is given: standard deviation, for pixels in [0, 1]."""
MODEL_ZOO = "the model zoo of ROG's authors"


class GAN(Enhancer):
    """ROG's postprocessing: averages a class-conditional generator's output with a denoised, super-resolved image.

    It was designed for reconstructions with a quarter of the image's side length: the latent of an attack with
    `latent_downscale` 4, not clamped. Other images are reduced to means of 4x4 pixels first, regardless of any finer
    detail.

    Args:
        folder: folder with `postmodel.pth`, `denoiser.pth`, `usrgan.pth` and `kernels_bicubicx234.mat`.
        chunk_size: number of images enhanced at once, which bounds memory.

    Raises:
        MissingFile: a file is missing.
        StorageError: a file cannot be read or does not fit its network.
    """

    def __init__(self, folder: Path = CHECKPOINTS / "rog", chunk_size: int = 16) -> None:
        folder = Path(folder)
        with torch.device("meta"):  # no random initialisation: weights are loaded below
            self.generator, self.denoiser, self.usrnet = Generator(), RogDenoiser(), USRNet()
        for network, name, parts in (
            (self.generator, "postmodel.pth", ("gen_state_dict",)),
            (self.denoiser, "denoiser.pth", ("gen_state_dict",)),
            (self.usrnet, "usrgan.pth", ()),
        ):
            load_strictly(network, read_weights(folder / name, MODEL_ZOO, parts), folder / name)
            network.eval().requires_grad_(False)
        self.kernel = read_kernel(folder / "kernels_bicubicx234.mat", FACTOR)
        self.chunk_size = chunk_size

    def check(self, image_shape: ImageShape, num_classes: int | None) -> None:
        super().check(image_shape, num_classes)
        _, height, width = image_shape
        if height % MULTIPLE or width % MULTIPLE:
            raise SettingError(
                f"ROG's networks need image sides that are multiples of {MULTIPLE} pixels, but these are "
                f"{height}x{width}. Attack images of 128x128, for which they were designed."
            )
        if num_classes not in (None, NUM_CLASSES):
            raise SettingError(
                f"The attacked model has {num_classes} classes, but ROG's generator has ImageNet's {NUM_CLASSES}, so "
                "their labels differ in meaning. Leave this enhancement out, or attack a model of ImageNet's classes."
            )

    @torch.no_grad()
    def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
        images, labels, latent = reconstruction.images, reconstruction.labels, reconstruction.latent
        self.check(images.shape[1:], reconstruction.num_classes)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < NUM_CLASSES:
            raise SettingError(
                f"ROG's generator supports ImageNet labels 0 to {NUM_CLASSES - 1}, but labels run from "
                f"{int(labels.min())} to {int(labels.max())}. Omit this enhancement for other classes."
            )
        for network in (self.generator, self.denoiser, self.usrnet):
            network.to(images.device)
        given = latent is not None and reconstruction.latent_downscale == FACTOR
        small = latent if given else F.avg_pool2d(images, FACTOR)
        chunks = [images[:0].expand(-1, 3, -1, -1)]
        for part, classes in zip(small.split(self.chunk_size), labels.split(self.chunk_size), strict=True):
            if len(part):
                chunks.append(self._chain(part.to(images).expand(-1, 3, -1, -1), classes.to(images.device)).to(images))
        enhanced = torch.cat(chunks)
        return enhanced if images.shape[1] == 3 else enhanced.mean(1, keepdim=True)

    def _chain(self, small: Tensor, labels: Tensor) -> Tensor:
        # As torchvision's `Resize` in ROG's code: bilinear, pixels are areas, nothing is clamped.
        enlarged = F.interpolate(small, scale_factor=FACTOR, mode="bilinear", align_corners=False)
        generated = self.generator(enlarged, labels)
        sharpened = self.usrnet(self.denoiser(small), self.kernel.to(small), FACTOR, NOISE)
        return (0.5 * generated + 0.5 * sharpened).clamp(0, 1)


def read_kernel(path: Path, factor: int) -> Tensor:
    """Read the (k, k) blur kernel for a downsampling factor of 2, 3 or 4 from ROG's MATLAB file.

    Raises:
        MissingFile: the file does not exist.
        StorageError: the file does not hold ROG's kernels.
    """
    if not path.is_file():
        raise MissingFile(f"There are no blur kernels at '{path}'. Get them from {MODEL_ZOO} and save them there.")
    try:
        kernel = loadmat(path)["kernels"][0, factor - 2]
        return torch.tensor(kernel.astype("float32"))
    except Exception as error:  # scipy raises many exception types for other files
        raise StorageError(
            f"'{path}' does not hold blur kernels in a MATLAB variable `kernels` ({in_short(error)}). "
            f"Get the file again from {MODEL_ZOO}."
        ) from error
