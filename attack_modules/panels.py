"""Comparison panels of images and PNG export; 0 is black and 1 is white, without contrast stretching."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from fl_lightning.errors import SettingError
from fl_lightning.storage import atomic_path

GAP = 4
"""Pixels between images."""
INK = (40, 40, 40)


def draw_panel(
    rows: dict[str, Tensor], captions: list[str] | None = None, max_columns: int = 16, cell: int = 96
) -> Image.Image:
    """Draw named rows of images on a white background, one column per image.

    An image with a NaN or infinite pixel, i.e. without a reconstruction, is drawn as a cell hatched in grey.

    Args:
        rows: row name -> (M, C, H, W) images, clamped to [0, 1]; C is 1 or 3; M, H and W are the same in every row.
        captions: M texts, one below each column.
        max_columns: maximum number of columns; further images continue in another band of rows.
        cell: minimum length of an image's longer side, in pixels; smaller images are enlarged by the smallest
            sufficient integer factor, without interpolation.

    Raises:
        SettingError: there are no images, the rows differ in shape, or the number of captions is not M.
    """
    sizes = {(len(images), *images.shape[-2:]) for images in rows.values()}
    if len(sizes) != 1 or 0 in (size := sizes.pop()):
        shapes = ", ".join(f"{name} {tuple(images.shape)}" for name, images in rows.items())
        raise SettingError(
            f"All rows of a panel need the same number and size of images, but got: {shapes or 'none'}. "
            "Resize the images or omit a row."
        )
    count, height, width = size
    if captions is not None and len(captions) != count:
        raise SettingError(f"{len(captions)} captions came with {count} images. Give one per image, or None.")

    factor = math.ceil(cell / max(height, width))
    height, width = factor * height, factor * width
    font = ImageFont.load_default(max(13, max(height, width) // 8))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    names = [ruler.multiline_textbbox((0, 0), name, font) for name in rows]
    notes = [ruler.multiline_textbbox((0, 0), caption, font) for caption in captions or ()]
    left = math.ceil(max(box[2] for box in names)) + 4 * GAP
    pitch = max([width, *(math.ceil(box[2]) for box in notes)]) + GAP
    band = len(rows) * (height + GAP) + math.ceil(max((box[3] for box in notes), default=0)) + 5 * GAP
    columns = min(count, max_columns)
    panel = Image.new("RGB", (left + columns * pitch + GAP, math.ceil(count / columns) * band + GAP), "white")
    draw = ImageDraw.Draw(panel)

    for row, (name, images) in enumerate(rows.items()):
        for top in range(2 * GAP + row * (height + GAP), panel.height, band):
            draw.multiline_text((left - 2 * GAP, top + height / 2), name, INK, font, anchor="rm", align="right")
        for index, image in enumerate(images):
            if image.isfinite().all():
                picture = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            else:
                picture = _hatching(width, height)
            x = left + index % columns * pitch + (pitch - GAP - width) // 2
            panel.paste(picture, (x, 2 * GAP + index // columns * band + row * (height + GAP)))
    for index, caption in enumerate(captions or ()):
        x = left + index % columns * pitch + (pitch - GAP) / 2
        y = 2 * GAP + index // columns * band + len(rows) * (height + GAP)
        draw.multiline_text((x, y), caption, INK, font, anchor="ma", align="center")
    return panel


def to_pil(image: Tensor) -> Image.Image:
    """Convert a (C, H, W) image, C 1 or 3, to 8 bits: clamped to [0, 1], rounded to the nearest level."""
    return to_pil_image(image.detach().float().cpu().clamp(0, 1).mul(255).round().byte())


def save_png(image: Tensor, path: Path) -> None:
    """Save a (C, H, W) image in [0, 1] as PNG, atomically: the file is complete or absent.

    Raises:
        StorageError: the file cannot be written, for example because the disk is full.
    """
    with atomic_path(path) as temporary:
        to_pil(image).save(temporary, format="png")


def save_images(images: Tensor, directory: Path) -> None:
    """Save each of the images (N, C, H, W) as `NNN.png`; errors as of `save_png`."""
    for index, image in enumerate(images):
        save_png(image, directory / f"{index:03d}.png")


def _hatching(width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), (238, 238, 238))
    draw = ImageDraw.Draw(picture)
    for x in range(-height, width, 10):
        draw.line((x, height, x + height, 0), (205, 205, 205))
    return picture
