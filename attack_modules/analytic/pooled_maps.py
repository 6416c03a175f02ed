"""The maps in front of a convolution, ReLU and max pooling, from those behind them and the convolution's update.

Given the errors behind the convolution, its gradient is linear in its input maps, with one matrix for all channels:
out * k * k equations for N h w unknowns. Max pooling passes the errors behind it to the position of each maximum, which
the maps tell. So positions and maps are found in turn, from random maps. An output channel with a wrong position
contradicts the others, and counts the less, the more of its gradient is left unexplained: with that, positions of four
images of AlexNet (24 times as many equations as unknowns) are right in ten rounds, without it 6 % stay wrong.

The values of the maps behind are not among the equations, so that their misfit tells how exact the maps are. Neither
labels nor rates are used.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from attack_modules.analytic.residual_blocks import DETERMINED, POSITIVE, SMALL, linear_maps

ROUNDS = 30
"""Most of positions and maps in turn. Measured: 5 to 10 are enough."""
TELLS = 0.1
"""Misfit of the maps behind, up to which those in front tell where small ones passed ReLU, which reading blurs."""
LEAST = 0.003
"""Unexplained share of a channel's gradient, over the mean gradient, below which channels count alike: rounding."""
OVERDETERMINED = 10
"""Equations of a channel over its unknowns, from which the maps in front of max pooling are read. Measured, 4 draws of
weights and maps each: with 12 times and more all are, with 6 to 9 times three, with 4 times none."""
READ = 0.02
"""Misfit of the maps behind, up to which those in front count as read. Measured: 0.0005 to 0.001; else 0.1 and more."""


class Pooled(NamedTuple):
    """A convolution of stride 1, and what follows it.

    Attributes:
        layer: the convolution, of several maps behind a ReLU.
        pooling: max pooling behind the ReLU that follows; None where the ReLU's outputs go on as they are.
    """

    layer: nn.Conv2d
    pooling: nn.MaxPool2d | None

    def reads(self, images: int, positions: int) -> bool:
        """Whether the gradient determines the maps of so many images, of so many positions each."""
        plain = self.layer.groups == 1 and self.layer.padding_mode == "zeros"
        if not plain or {*self.layer.stride, *self.layer.dilation} != {1} or isinstance(self.layer.padding, str):
            return False
        same = all(size == 2 * pad + 1 for size, pad in zip(self.layer.kernel_size, self.layer.padding, strict=True))
        equations = self.layer.weight[:, 0].numel()
        needed = OVERDETERMINED if self.pooling else DETERMINED
        return same and equations >= needed * images * positions

    def pooled(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """What comes of the convolution's outputs (N, out, h, w), and (N, out, P) the positions of the maxima."""
        if self.pooling is None:
            positions = torch.arange(outputs[0, 0].numel(), device=outputs.device).expand(*outputs.shape[:2], -1)
            return outputs.relu(), positions
        of = self.pooling
        shape = of.kernel_size, of.stride, of.padding, of.dilation, of.ceil_mode
        found, positions = F.max_pool2d(outputs, *shape, return_indices=True)
        return found.relu(), positions.flatten(2)


class PooledMaps(NamedTuple):
    """The maps in front of a convolution.

    Attributes:
        maps: (N, c, h, w).
        misfit: relative distance of the maps behind, which these give, to those that were known.
    """

    maps: Tensor
    misfit: float


@torch.no_grad()
def maps_before_pooling(
    of: Pooled, behind: Tensor, errors: Tensor, gradient: Tensor, side: tuple[int, int]
) -> PooledMaps:
    """The maps in front of a convolution that `reads` them.

    Args:
        of: the convolution, with the weights under which the gradient was taken.
        behind: (N, out, h', w') maps behind ReLU and pooling.
        errors: (N, out, h', w') derivative of the aggregated loss by these.
        gradient: (out, c, kh, kw) of the weight.
        side: (h, w) of the maps in front.
    """
    shape = len(behind), gradient.shape[1], *side
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(behind) * behind.mean()
    error = -2 * behind.min()  # maps behind a ReLU are negative by errors alone
    opened = behind > torch.maximum(POSITIVE * behind.mean(), error)
    size, least = gradient.flatten(1).norm(dim=1), LEAST * gradient.flatten(1).norm() / len(gradient) ** 0.5
    before: Tensor | None = None
    for _ in range(ROUNDS):
        shown, positions = of.pooled(of.layer(maps))
        if (shown - behind).norm() <= TELLS * behind.norm():
            opened = (behind > SMALL * behind.mean()) | (shown > 0)
        taken = (errors * opened).flatten(2)
        outer = taken.new_zeros(*taken.shape[:2], side[0] * side[1]).scatter_add(2, positions, taken)
        outer = outer.unflatten(2, side)
        if before is not None and outer.equal(before):
            break
        before = outer
        off = conv2d_weight(maps, gradient.shape, outer, padding=of.layer.padding) - gradient
        weight = size.mean() / (off.flatten(1).norm(dim=1) + least)
        weighted = gradient * weight[:, None, None, None], outer * weight[:, None, None]
        maps = linear_maps(of.layer, *weighted).relu()
    shown, _ = of.pooled(of.layer(maps))
    return PooledMaps(maps, ((shown - behind).norm() / behind.norm()).item())
