"""U-Net on 2x2 pixel blocks with the preconditioning of EDM (arXiv 2206.00364, table 1).

The pixels of each 2x2 block become channels (as in FFDNet, arXiv 1710.04026), which reduces the cost to a quarter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def unet_of_squares(channels: list[int], layers: int, num_classes: int | None = None) -> UNet2DModel:
    """Build a convolutional U-Net without attention on (N, 12, H/2, W/2), initialised to output zero.

    Args:
        channels: channels of each level, finest first, multiples of 8; each level halves height and width.
        layers: residual blocks per level.
        num_classes: number of class labels, including any null class; null for an unconditional network.
    """
    from diffusers import UNet2DModel  # takes a second to load

    unet = UNet2DModel(
        in_channels=12,
        out_channels=12,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        add_attention=False,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=num_classes,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def denoised(
    unet: UNet2DModel,
    noisy: Tensor,
    sigma: Tensor,
    told: Tensor,
    sigma_data: float,
    labels: Tensor | None = None,
) -> Tensor:
    """Return the posterior mean of the clean images; before training, the best pixelwise linear estimate.

    Args:
        unet: from `unet_of_squares`.
        noisy: (N, 3, H, W) zero-centred images plus Gaussian noise.
        sigma: (N,) standard deviation of that noise.
        told: (N,) noise level that the U-Net is conditioned on; it differs from `sigma` outside the trained range.
        sigma_data: standard deviation of the images' pixels.
        labels: (N,) class labels, long, if the network is class-conditional.

    Returns:
        (N, 3, H, W) zero-centred images.
    """
    timestep = 8 * told.log()  # 8: the embedding's shortest period is 0.8 in log sigma
    sigma = sigma[:, None, None, None]
    variance = sigma.square() + sigma_data**2
    squares = pixel_unshuffle(noisy * variance.rsqrt(), 2).contiguous(memory_format=torch.channels_last)
    change = pixel_shuffle(unet(squares, timestep, class_labels=labels).sample, 2)
    return sigma_data**2 / variance * noisy + sigma * sigma_data * variance.rsqrt() * change


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return the (N,) loss weights under which the U-Net's output error counts equally at every noise level."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
