"""Conversion of image files to tensors, and in-memory image datasets."""

import os
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from fl_lightning.errors import SettingError

PathLike = str | os.PathLike
"""Types accepted as a path."""


class UnreadableImage(SettingError):
    """A file cannot be read as an image."""


def read_image(file: PathLike | BytesIO, image_size: int, channels: int, name: str | None = None) -> Tensor:
    """Read an image file, rotated upright by its EXIF orientation, centre-cropped to a square and resized.

    Args:
        file: a path, or the file's content.
        image_size: height and width of the result, in pixels.
        channels: 3 for RGB, 1 for greyscale.
        name: name of the file in error messages; None: its path.

    Returns:
        uint8 (channels, image_size, image_size), see `to_pixels`.

    Raises:
        UnreadableImage: the file is missing, truncated, not an image, larger than Pillow opens (179 million pixels), or
            has pixels of unknown value range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # for images of half that size
            with Image.open(file) as image:
                upright = ImageOps.exif_transpose(image)
            return to_pixels(upright, image_size, channels)  # older versions of Pillow warn at a crop, too
    except Exception as error:  # for malformed files Pillow's decoders raise many exception types
        raise _unreadable(readable_name(str(name or file)), error) from error


def _unreadable(name: str, error: Exception) -> UnreadableImage:
    """The error for an image at which Pillow raised `error`."""
    remedy = "Replace it with an intact JPEG, PNG, TIFF, BMP, GIF or WebP file, or remove it."
    reason = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "it is empty, or no image of a known format"
    elif isinstance(error, Image.DecompressionBombError):
        reason, remedy = "it has too many pixels, or a damaged header that claims so", "Make it smaller, or remove it."
    elif isinstance(error, OSError) and error.strerror:
        reason, remedy = error.strerror, "Correct the path or its permissions."
    return UnreadableImage(f"The image '{name}' cannot be read ({reason}). {remedy}")


def read_size(file: PathLike) -> tuple[int, int]:
    """Read the shorter side in pixels, and the number of channels (1 or 3), of an image file.

    Raises:
        UnreadableImage: the file is missing or not an image.
    """
    try:
        with Image.open(file) as image:
            return min(image.size), 1 if image.mode in ("1", "L", "LA", "I", "I;16") else 3
    except Exception as error:  # as in `read_image`
        raise _unreadable(readable_name(file), error) from error


def to_pixels(image: Image.Image, image_size: int, channels: int) -> Tensor:
    """Convert an image of any size and mode to uint8 (channels, image_size, image_size).

    Transparent images are composited on white, 16-bit values are scaled to 8 bits, and RGB is converted to greyscale
    by ITU-R 601. The largest centred square is resized by an antialiased Lanczos filter; an image that already has
    the target size keeps its pixels.

    Raises:
        ValueError: the pixels are floats, or integers outside [0, 65535], so their value range is unknown.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose value range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        wide = np.array(image, dtype=np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels are 32-bit integers, whose value range is unknown; save it with 8 or 16 bits")
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
    """In-memory images and labels; a list, slice or tensor as index selects a whole batch in one tensor operation.

    Args:
        pixels: uint8 (N, C, H, W).
        labels: long (N,).
        sources: where each image comes from, a path or a name; None: unknown.
        persons: whom each image shows, empty where it is not known; None: unknown.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, sources: list[str] | None = None, persons: list[str] | None = None
    ) -> None:
        if len(pixels) != len(labels):
            raise SettingError(f"{len(pixels)} images came with {len(labels)} labels. Give one label per image.")
        self.pixels = pixels
        self.labels = labels
        self.sources = [""] * len(labels) if sources is None else sources
        self.persons = [""] * len(labels) if persons is None else persons

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int] | slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return images (float32 in [0, 1]) and labels, without the first dimension if `index` is an integer."""
        return self.pixels[index].float() / 255, self.labels[index]

    def part(self, start: int, count: int) -> "ImageSet":
        """`count` consecutive images from index `start`."""
        place = slice(start, start + count)
        return ImageSet(self.pixels[place], self.labels[place], self.sources[place], self.persons[place])

    @property
    def images(self) -> Tensor:
        """All images, float32 (N, C, H, W) in [0, 1]."""
        return self[:][0]

    def dataloader(
        self, batch_size: int | None = None, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader:
        """Create a dataloader of mini-batches; without images it is empty.

        Args:
            batch_size: images per batch, fewer in the last batch if necessary; None: one full batch.
            shuffle: whether the order of the images is random.
            generator: source of that randomness; None: torch's global generator.
        """
        size = max(len(self), 1) if batch_size is None else batch_size
        # RandomSampler refuses an empty dataset.
        order = RandomSampler(self, generator=generator) if shuffle and len(self) else SequentialSampler(self)
        # Without a `generator`, every iteration over a DataLoader draws from torch's global generator.
        return DataLoader(
            self, batch_size=None, sampler=BatchSampler(order, size, drop_last=False), generator=generator
        )


def pool(sets: list[ImageSet]) -> ImageSet:
    """Concatenate several image sets, in order."""
    sources, persons = ([name for s in sets for name in getattr(s, of)] for of in ("sources", "persons"))
    return ImageSet(torch.cat([s.pixels for s in sets]), torch.cat([s.labels for s in sets]), sources, persons)


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def readable_name(path: PathLike) -> str:
    """A path as text that can be printed and saved; bytes of its name that are no UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")


def is_image_name(name: str) -> bool:
    """Whether a file name has an image suffix and is not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
