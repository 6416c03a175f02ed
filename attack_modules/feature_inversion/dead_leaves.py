"""Synthetic images whose statistics resemble those of photographs."""

import torch
from torch import Tensor

from fl_lightning.models import ImageShape

LEAVES = 400
"""Number of ellipses in an image, each painted over those before."""
SMALLEST = 1.5
"""Smallest radius in pixels; the largest is half of the image."""
SATURATION = 0.25
"""Standard deviation of the channels around a leaf's grey."""


def dead_leaves(count: int, image_shape: ImageShape, seed: int = 0) -> Tensor:
    """Dead leaves: opaque ellipses of all sizes and of colours near grey, which occlude each other.

    The density of their radii falls with the third power, which makes the images scale-invariant, as photographs are
    (Lee, Mumford and Huang 2001; for learning, Baradad et al. 2021, arXiv 2106.05963).

    Args:
        count: number of images.
        image_shape: (C, H, W) of each.
        seed: of the images.

    Returns:
        (count, C, H, W) float in [0, 1].
    """
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, 1, 1, generator=generator)

    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    images = uniform(channels).repeat(1, 1, height, width)
    smallest, largest = SMALLEST**-2, (min(height, width) / 2) ** -2
    for _ in range(LEAVES):
        radius = (smallest + uniform(1) * (largest - smallest)).rsqrt()
        down, right, angle = rows - uniform(1) * height, columns - uniform(1) * width, uniform(1) * torch.pi
        along = angle.cos() * right + angle.sin() * down
        across = (angle.cos() * down - angle.sin() * right) / (0.5 + 0.5 * uniform(1))
        spread = SATURATION * torch.randn(count, channels, 1, 1, generator=generator)
        colour = (uniform(1) + (spread if channels > 1 else 0)).clamp(0, 1)
        images = torch.where(along.square() + across.square() < radius.square(), colour, images)
    return images
