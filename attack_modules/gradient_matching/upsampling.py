"""From a low-resolution latent to an image, and back."""

import torch
from torch import Tensor
from torch.nn import functional as F


def upsampled(latent: Tensor, latent_downscale: int) -> Tensor:
    """(N, C, h, w) latent -> (N, C, h * latent_downscale, w * latent_downscale) images, by bicubic interpolation."""
    return latent if latent_downscale == 1 else F.interpolate(latent, scale_factor=latent_downscale, mode="bicubic")


def nearest_latent(images: Tensor, latent_downscale: int) -> Tensor:
    """(N, C, H, W) images -> (N, C, h, w) latents whose upsampled images are nearest, in least squares."""

    def back(size: int) -> Tensor:  # (h, H) pseudo-inverse of upsampling along one side
        rows = torch.eye(size // latent_downscale)[None, None]
        return torch.linalg.pinv(F.interpolate(rows, scale_factor=(latent_downscale, 1), mode="bicubic")[0, 0]).to(
            images
        )

    return back(images.shape[2]) @ images @ back(images.shape[3]).T
