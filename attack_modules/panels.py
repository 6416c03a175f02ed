"""Pictures for people: panels that compare rows of images, and PNG files. Black is 0, white is 1, never stretched."""

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
    """Draw images in named rows, one column an image, on white.

    A cell is hatched in grey where an image has a NaN or infinite pixel: nothing was reconstructed.

    Args:
        rows: name -> (M, C, H, W) images, clamped to [0, 1]; C is 1 or 3, all else is the same in every row.
        captions: M texts, one under each column.
        max_columns: images beyond these continue in a further band of rows.
        cell: pixels that an image's longer side must have; smaller ones are enlarged by the least whole factor, without
            interpolation.

    Raises:
        SettingError: nothing to draw, rows of different shapes, or another number of captions.
    """
    sizes = {(len(images), *images.shape[-2:]) for images in rows.values()}
    if len(sizes) != 1 or 0 in (size := sizes.pop()):
        shapes = ", ".join(f"{name} {tuple(images.shape)}" for name, images in rows.items())
        raise SettingError(
            f"A panel needs rows of equally many, equally large images, but these are: {shapes or 'none'}. "
            "Resize them or leave a row out."
        )
    count, height, width = size
    if captions is not None and len(captions) != count:
        raise SettingError(f"{len(captions)} captions came with {count} images. Give one an image, or None.")

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
    """(C, H, W) image, C 1 or 3, clamped to [0, 1] -> 8-bit picture, rounded to the nearest level."""
    return to_pil_image(image.detach().float().cpu().clamp(0, 1).mul(255).round().byte())


def save_png(image: Tensor, path: Path) -> None:
    """Save a (C, H, W) image in [0, 1] as PNG; the file is whole or not there.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        to_pil(image).save(temporary, format="png")


def _hatching(width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), (238, 238, 238))
    draw = ImageDraw.Draw(picture)
    for x in range(-height, width, 10):
        draw.line((x, height, x + height, 0), (205, 205, 205))
    return picture
