"""A U-Net on 2x2 pixels at a time under the preconditioning of EDM (arXiv 2206.00364, table 1).

The pixels of each 2x2 square become channels (as in FFDNet, arXiv 1710.04026), which quarters the cost.
"""

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def unet_of_squares(channels: list[int], layers: int, num_classes: int | None = None) -> UNet2DModel:
    """A convolutional U-Net without attention on (N, 12, H/2, W/2), which predicts nothing before it is trained.

    Args:
        channels: of the levels, finest first, multiples of 8; each level halves height and width.
        layers: residual blocks a level.
        num_classes: labels that it is told, null for none.
    """
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
    """The expected clean images; before training, of the best pixelwise linear denoiser.

    Args:
        unet: of `unet_of_squares`.
        noisy: (N, 3, H, W) images about 0, plus Gaussian noise.
        sigma: (N,) standard deviation of that noise.
        told: (N,) the one that the network is told.
        sigma_data: standard deviation of the images' pixels.
        labels: (N,) long, if the network takes any.
    """
    timestep = 8 * told.log()  # 8: a period of the embedding is 0.8 in log sigma
    sigma = sigma[:, None, None, None]
    variance = sigma.square() + sigma_data**2
    squares = pixel_unshuffle(noisy * variance.rsqrt(), 2).contiguous(memory_format=torch.channels_last)
    change = pixel_shuffle(unet(squares, timestep, class_labels=labels).sample, 2)
    return sigma_data**2 / variance * noisy + sigma * sigma_data * variance.rsqrt() * change


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """(N,) weight of the squared error, which makes the U-Net's own error count alike at every noise level."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
