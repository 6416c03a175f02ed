"""Max pooling whose gradient also reaches inputs that are nearly the maximum, for the inversion of features."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fl_lightning.models import ImageClassifier


class SoftPooling(nn.Module):
    """Max pooling that shares its gradient among the inputs close to the maximum; the outputs are exact.

    A wrong image has its maxima at wrong places, and the exact gradient changes it at these alone: which input is the
    maximum changes only by chance, as the iterates jump about. With a share that falls linearly to 0 at `softness`
    standard deviations below the maximum, inputs that could be the maximum are moved too.

    Args:
        layer: a max pooling that `fits`.
    """

    softness: float = 0.0
    """Distance from the maximum up to which an input has a share, in standard deviations of an image's outputs."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        self.layer = layer

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether a layer is a max pooling without dilation, whose windows all begin inside of the padded map."""
        return type(layer) is nn.MaxPool2d and layer.dilation in (1, (1, 1)) and not layer.ceil_mode

    def forward(self, maps: Tensor) -> Tensor:
        if not self.softness or not maps.requires_grad or self.layer.return_indices or maps.dim() != 4:
            return self.layer(maps)
        return _SoftPooling.apply(maps, self.layer, self.softness)


class _SoftPooling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, layer: nn.MaxPool2d, softness: float) -> Tensor:
        outputs = layer(maps)
        ctx.save_for_backward(maps, outputs)
        ctx.layer, ctx.softness = layer, softness
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        maps, outputs = ctx.saved_tensors
        fall = ((ctx.softness * _spread(outputs)).to(maps.dtype) + torch.finfo(maps.dtype).tiny).reciprocal()
        padded, inside = _padded(maps, ctx.layer, -torch.inf)
        found = torch.empty_like(padded) if _divides(ctx.layer, padded) else torch.zeros_like(padded)
        at_once = 1 if maps.device.type == "cpu" else len(maps)  # one image's maps stay in a processor's cache
        tensors = (padded, outputs, gradient, fall, found)
        for part in zip(*(tensor.split(at_once) for tensor in tensors), strict=True):
            _distribute(*part, ctx.layer)
        return found[inside], None, None


def _distribute(
    maps: Tensor, outputs: Tensor, gradient: Tensor, fall: Tensor, found: Tensor, layer: nn.MaxPool2d
) -> None:
    """Add to `found` (N, C, H, W) the shares of the gradient (N, C, h, w) that the padded `maps` have.

    A share is 1 at the maximum, and less by `fall` (N, 1, 1, 1) for each unit below.
    """
    shares = [torch.sub(part, outputs).mul_(fall).add_(1).clamp_min_(0) for part in _windows(maps, outputs, layer)]
    total = shares[0].clone()
    for share in shares[1:]:
        total.add_(share)
    slope = torch.div(gradient, total, out=total)
    disjoint = _divides(layer, maps)
    for share, part in zip(shares, _windows(found, outputs, layer), strict=True):
        if disjoint:  # one pass over the memory instead of two
            torch.mul(share, slope, out=part)
        else:
            part.addcmul_(share, slope)


def _spread(outputs: Tensor) -> Tensor:
    """(N, 1, 1, 1) standard deviations of maps (N, C, h, w), at least in float32; `std` takes ten times as long."""
    among = {"dim": (1, 2, 3), "keepdim": True, "dtype": torch.promote_types(outputs.dtype, torch.float32)}
    squares = torch.linalg.vector_norm(outputs, **among).square() / outputs[0].numel()
    return (squares - outputs.mean(**among).square()).clamp_min_(0).sqrt_()


def soften(model: ImageClassifier) -> ImageClassifier:
    """The model with `SoftPooling` instead of each max pooling that it fits."""
    for name, layer in list(model.features.named_modules()):
        if SoftPooling.fits(layer):
            model.features.set_submodule(name, SoftPooling(layer))
    return model


@contextmanager
def softened(model: ImageClassifier, softness: float) -> Iterator[None]:
    """Graphs of the model that are made meanwhile have so soft a pooling, see `SoftPooling.softness`."""
    layers = [layer for layer in model.features.modules() if isinstance(layer, SoftPooling)]
    for layer in layers:
        layer.softness = softness
    try:
        yield
    finally:
        for layer in layers:
            layer.softness = 0.0


def _divides(layer: nn.MaxPool2d, padded: Tensor) -> bool:
    """Whether each input of padded maps (N, C, H, W) is in exactly one window."""
    kernel = _pair(layer.kernel_size)
    return kernel == _pair(layer.stride) and all(n % k == 0 for n, k in zip(padded.shape[2:], kernel, strict=True))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _padded(maps: Tensor, layer: nn.MaxPool2d, value: float) -> tuple[Tensor, tuple[slice, ...]]:
    """The padded maps, and where in them the maps lie."""
    down, right = _pair(layer.padding)
    inside = (..., slice(down, down + maps.shape[2]), slice(right, right + maps.shape[3]))
    return (F.pad(maps, (right, right, down, down), value=value) if down or right else maps), inside


def _windows(padded: Tensor, outputs: Tensor, layer: nn.MaxPool2d) -> Iterator[Tensor]:
    """For each place in a window, views (N, C, h, w) of the inputs there of all windows."""
    (height, width), (down, right) = _pair(layer.kernel_size), _pair(layer.stride)
    rows, columns = down * (outputs.shape[2] - 1) + 1, right * (outputs.shape[3] - 1) + 1
    for y, x in product(range(height), range(width)):
        yield padded[:, :, y : y + rows : down, x : x + columns : right]
