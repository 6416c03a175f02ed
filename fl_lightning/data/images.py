"""Image files as tensors, and a client's images as a dataset."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from fl_lightning.errors import SettingError

PathLike = str | os.PathLike
"""What a user may give as a path."""


class UnreadableImage(SettingError):
    """A file that was to be an image and cannot be read as one."""


def read_image(file: PathLike | BytesIO, image_size: int, channels: int, name: str | None = None) -> Tensor:
    """The image in a file, upright, cut to its centre square and resized.

    Args:
        file: a path, or the file's content.
        image_size: height and width of the result, in pixels.
        channels: 3 for RGB, 1 for grey.
        name: what to call the file in an error; a path names itself.

    Returns:
        uint8 (channels, image_size, image_size), see `to_pixels`.

    Raises:
        UnreadableImage: the file is missing, truncated, not an image, or has pixels of an unknown range.
    """
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
        return to_pixels(upright, image_size, channels)
    except Exception as error:  # foreign bytes make Pillow's decoders raise nearly anything
        raise UnreadableImage(
            f"The image '{name or file}' cannot be read ({error}). "
            "Replace it with a whole JPEG, PNG, TIFF, BMP, GIF or WebP file, or take it out."
        ) from error


def read_size(file: PathLike) -> tuple[int, int]:
    """The shorter side, in pixels, and the channels, 1 or 3, of the image in a file.

    Raises:
        UnreadableImage: the file is missing or not an image.
    """
    try:
        with Image.open(file) as image:
            return min(image.size), 1 if image.mode in ("1", "L", "LA", "I", "I;16") else 3
    except OSError as error:
        raise UnreadableImage(f"The image '{file}' cannot be read ({error}). Name an image file.") from error


def to_pixels(image: Image.Image, image_size: int, channels: int) -> Tensor:
    """uint8 (channels, image_size, image_size) of an image of any size and mode.

    Alpha is composited on white, 16 bits are scaled to 8, RGB becomes grey by ITU-R 601. The largest centred square
    is resized by an antialiased Lanczos filter; an image that already has the size keeps its pixels.

    Raises:
        SettingError: the pixels are floats or integers above 65535, so nobody can say what white is.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        wide = np.array(image, dtype=np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels have 32 bits, whose range is unknown; save it with 8 or 16 bits")
        image = Image.fromarray((wide / 257).round().astype(np.uint8))  # 65535 = 255 * 257
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    pixels = np.array(square.resize((image_size, image_size), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).view(image_size, image_size, channels).permute(2, 0, 1).contiguous()


class ImageSet(Dataset):
    """Images and labels in memory; an index of any kind gives a whole batch by one tensor operation.

    Args:
        pixels: uint8 (N, C, H, W).
        labels: long (N,).
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        if len(pixels) != len(labels):
            raise SettingError(f"{len(pixels)} images came with {len(labels)} labels. Give one label an image.")
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int] | slice | Tensor) -> tuple[Tensor, Tensor]:
        """(images float32 in [0, 1], labels), without the first dimension if `index` is a number."""
        return self.pixels[index].float() / 255, self.labels[index]

    @property
    def images(self) -> Tensor:
        """All images, float32 (N, C, H, W) in [0, 1]."""
        return self[:][0]

    def dataloader(
        self, batch_size: int | None = None, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader:
        """Batches of `batch_size` images, the last one maybe smaller; None: one batch of all. No images, no batches."""
        size = max(len(self), 1) if batch_size is None else batch_size
        # RandomSampler refuses an empty dataset.
        order = RandomSampler(self, generator=generator) if shuffle and len(self) else SequentialSampler(self)
        # Without `generator` of its own, every pass of a DataLoader would draw from the global one.
        return DataLoader(
            self, batch_size=None, sampler=BatchSampler(order, size, drop_last=False), generator=generator
        )


def pool(sets: list[ImageSet]) -> ImageSet:
    """All images of several sets, in their order."""
    return ImageSet(torch.cat([s.pixels for s in sets]), torch.cat([s.labels for s in sets]))


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden files are not."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
