"""Image priors: regularisation terms that are added to an attack's loss."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fl_lightning.errors import SettingError, non_negative


class Prior(ABC):
    """A penalty on images that are unlike photographs.

    Args:
        weight: weight in the attack's loss, at least 0. The attack multiplies by it; the penalty itself is unweighted.

    Raises:
        SettingError: `weight` is negative.
    """

    def __init__(self, weight: float) -> None:
        if not non_negative(weight):
            raise SettingError(f"A prior's weight must not be negative, but got {weight}. Use 0 to disable it.")
        self.weight = weight

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] -> (N,) penalties."""


class TotalVariation(Prior):
    """Anisotropic total variation: mean absolute difference of neighbouring pixels (Rudin, Osher and Fatemi 1992).

    Args:
        weight: weight in the attack's loss.
    """

    def __init__(self, weight: float = 1e-3) -> None:
        super().__init__(weight)

    def __call__(self, images: Tensor) -> Tensor:
        return total_variation(images).mean(1)


class ChromaTotalVariation(Prior):
    """Total variation in YCbCr with a larger weight on chroma; plain total variation for grey images.

    Chroma is penalised more because random filters lose colour information first, and photographs vary little in it.

    Args:
        weight: weight in the attack's loss.
        chroma: weight of Cb and Cr, relative to 1 for Y.
    """

    def __init__(self, weight: float = 1e-3, chroma: float = 4.0) -> None:
        super().__init__(weight)
        self.chroma = chroma

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] != 3:
            return total_variation(images).mean(1)
        scale = images.new_tensor([1.0, self.chroma, self.chroma])
        return (total_variation(rgb_to_ycbcr(images)) * scale).mean(1)


def annealed(factors: tuple[float, float], step: int, steps: int) -> float:
    """Factor on the priors' weights at a step, interpolated geometrically from `factors[0]` to `factors[1]`."""
    start, end = factors
    progress = min(step / max(steps - 1, 1), 1.0)
    return start ** (1 - progress) * end**progress


def total_variation(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C): mean absolute vertical difference plus mean absolute horizontal difference."""
    return _TotalVariation.apply(images)


class _TotalVariation(torch.autograd.Function):
    """Its gradient takes half the time of that which is composed of differences, their signs and means."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return images.diff(dim=2).abs_().mean((2, 3)) + images.diff(dim=3).abs_().mean((2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (images,) = ctx.saved_tensors
        found = torch.zeros_like(images)
        for dim in (2, 3):
            signs = images.diff(dim=dim).sign_()
            signs.mul_((slope / signs[0, 0].numel())[..., None, None])
            found.narrow(dim, 1, signs.shape[dim]).add_(signs)
            found.narrow(dim, 0, signs.shape[dim]).sub_(signs)
        return found


def rgb_to_ycbcr(images: Tensor) -> Tensor:
    """Convert (N, 3, H, W) RGB in [0, 1] to Y in [0, 1], Cb and Cr in [-0.5, 0.5] (ITU-R BT.601, as in JPEG)."""
    matrix = images.new_tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    return torch.einsum("dc,nchw->ndhw", matrix, images)
