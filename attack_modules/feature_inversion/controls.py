"""Control images: how well known images come back from features that are as wrong as the leaked ones may be."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.feature_inversion.dead_leaves import dead_leaves
from fl_lightning.models import ImageClassifier

ERRORS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Relative errors of the features, one control image each."""
SEED = 1
"""Of the control images; the linear decoder is fitted to those of seed 0."""
DRAWN_SIDE = 256
"""Control images are drawn at least so large and twice as large as needed, then reduced, as photographs are."""
CHROMA = 0.3
"""Share of the chroma that is left, since the chroma of photographs is lower than that of dead leaves. With both,
control images come back as well as photographs (LeNet5, 64 pixels: 38 dB), without them 20 dB worse."""
STRETCHED = 2
"""Control images of another contrast, which cost a third of the others."""
STRETCHES = 20
"""Iterations of it."""


@dataclass(frozen=True)
class KnownImages:
    """How known images come back from features with the relative errors `ERRORS`, in their order.

    Attributes:
        psnr: in dB.
        misfit: relative distance of what was found to the features that it was found from.
    """

    psnr: list[float]
    misfit: list[float]

    def psnr_at(self, errors: list[float]) -> list[float]:
        """PSNR in dB at other errors, interpolated over their logarithm."""
        return _between(self.psnr, errors)

    def misfit_at(self, errors: list[float]) -> list[float]:
        """Misfit at other errors, interpolated likewise."""
        return _between(self.misfit, errors)


@torch.no_grad()
def known_images(
    features: Tensor, model: ImageClassifier, invert: Callable[[Tensor], Tensor], controls: Tensor
) -> KnownImages:
    """What errors in their features do to known images, which tells what they do to the found ones.

    It depends on the model: on how much of an image its features keep, and which errors look like other images. So
    known images are reconstructed like the leaked ones, after an error was added to their features: half of it white,
    as of noise, half of it along the difference of two leaked images, as of images that are mixed.

    Args:
        features: (N, D) leaked.
        model: whose features they are.
        invert: (K, D) features -> (K, C, H, W) images, as the attack reconstructs them.
        controls: (K, C, H, W), as many for each of `ERRORS`, in their order.
    """
    controls = controls.to(model.mean)
    right = model.embed(controls)
    generator = torch.Generator().manual_seed(SEED)
    wrong = F.normalize(torch.randn(right.shape, generator=generator).to(right), dim=1)
    if len(features) > 1:
        pairs = torch.stack([torch.randperm(len(features), generator=generator)[:2] for _ in controls]).to(
            features.device
        )
        wrong = F.normalize(wrong + F.normalize(features[pairs[:, 0]] - features[pairs[:, 1]], dim=1), dim=1)
    each = len(controls) // len(ERRORS)
    size = right.norm(dim=1, keepdim=True) * torch.tensor(ERRORS).repeat_interleave(each).to(right)[:, None]
    given = right + size * wrong
    with torch.enable_grad():
        found = invert(given)
    psnr = -10 * (found - controls).square().mean((1, 2, 3)).clamp_min(1e-10).log10()
    misfit = (model.embed(found) - given).norm(dim=1) / given.norm(dim=1)
    psnr, misfit = (of.unflatten(0, (len(ERRORS), each)).mean(1) for of in (psnr, misfit))
    # a larger error is never better; single images scatter
    return KnownImages(psnr.cummin(0).values.tolist(), misfit.cummax(0).values.tolist())


def _between(measured: list[float], errors: list[float]) -> list[float]:
    return np.interp(np.log(np.clip(errors, ERRORS[0], ERRORS[-1])), np.log(ERRORS), measured).tolist()


@torch.no_grad()
def gain_of_contrast(images: Tensor, model: ImageClassifier, invert: Callable[[Tensor], Tensor], flat: float) -> float:
    """PSNR in dB above their mean colour at which control images of as much contrast as some images come back.

    Photographs have more contrast than dead leaves, and the same error leaves more of an image of more contrast.

    Args:
        images: (N, C, H, W) found, of which the median counts.
        model: whose features are inverted.
        invert: (K, D) features -> (K, C, H, W) images, as the attack reconstructs them.
        flat: PSNR in dB of the mean colour of control images as they are.

    Returns:
        -inf if the images have no more contrast than those.
    """
    contrast = (images - images.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).median().item()
    if not contrast > 10 ** (-flat / 10):
        return -math.inf
    controls = of_contrast(control_images(STRETCHED, images.shape[1:]), contrast).to(model.mean)
    features = model.embed(controls)
    with torch.enable_grad():
        found = invert(features)
    return mean_psnr(found, controls) - mean_colour_psnr(controls)


def mean_psnr(images: Tensor, originals: Tensor) -> float:
    """Mean PSNR in dB of images (N, C, H, W) of which the originals are known."""
    return -10 * (images - originals).square().mean((1, 2, 3)).clamp_min(1e-10).log10().mean().item()


def mean_colour_psnr(images: Tensor) -> float:
    """PSNR in dB of the mean colours of images (N, C, H, W), which show nothing of them; their mean."""
    return mean_psnr(images.mean((2, 3), keepdim=True), images)


def control_images(count: int, shape: tuple[int, ...]) -> Tensor:
    """(count, C, H, W) dead leaves as soft and as grey as photographs, in [0, 1]."""
    channels, height, width = shape
    factor = max(2, DRAWN_SIDE // min(height, width))
    drawn = dead_leaves(count, (channels, factor * height, factor * width), SEED)
    images = F.avg_pool2d(drawn, factor)
    grey = images.mean(1, keepdim=True)
    return grey + CHROMA * (images - grey)


def of_contrast(images: Tensor, contrast: float) -> Tensor:
    """Images (N, C, H, W) at the mean squared distance `contrast` from their mean colours, as far as [0, 1] allows."""
    mean = images.mean((2, 3), keepdim=True)
    for _ in range(STRETCHES):  # what is cut off at 0 and 1 lowers the contrast again
        now = (images - images.mean((2, 3), keepdim=True)).square().mean((1, 2, 3), keepdim=True)
        images = (mean + (contrast / now).sqrt() * (images - mean)).clamp(0, 1)
    return images
