"""Weights and updates of linear layers as low-rank factors, so that the dense matrices are never formed.

The gradient of a linear layer over a batch is `Delta^T X`, where `Delta (B, H)` are the errors at its outputs and
`X (B, D)` its inputs. So a weight after some SGD steps is `scale * base + left^T right` with few rows in `left` and
`right`. For LeNet5 at 128x128 pixels, this removes 33.5 million weights from every simulated local step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The (H, D) matrix `scale * base + sum_s left_s^T right_s`, which can be added, subtracted and scaled.

    Attributes:
        base: (H, D), constant.
        scale: of the base.
        left: (B_s, H) tensors.
        right: (B_s, D) tensors, as many.
    """

    base: Tensor
    scale: float
    left: tuple[Tensor, ...] = ()
    right: tuple[Tensor, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.base.device

    def __add__(self, other: LowRank) -> LowRank:
        left, right = list(self.left), list(self.right)
        for other_left, other_right in zip(other.left, other.right, strict=True):
            same = next((i for i, own in enumerate(right) if own is other_right), None)
            if same is None:  # momentum adds the same factors repeatedly
                left.append(other_left)
                right.append(other_right)
            else:
                left[same] = left[same] + other_left
        return LowRank(self.base, self.scale + other.scale, tuple(left), tuple(right))

    def __sub__(self, other: LowRank) -> LowRank:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> LowRank:
        return LowRank(self.base, factor * self.scale, tuple(factor * left for left in self.left), self.right)

    def linear(self, inputs: Tensor) -> Tensor:
        """(B, D) inputs times the transposed matrix -> (B, H)."""
        outputs = self.scale * (inputs @ self.base.T)
        for left, right in zip(self.left, self.right, strict=True):
            outputs = outputs + (inputs @ right.T) @ left
        return outputs

    def inner(self, other: Tensor) -> Tensor:
        """The sum of products with the elements of a constant (H, D) matrix."""
        left, right = torch.cat(self.left), torch.cat(self.right)
        products = ((left @ other) * right).sum()
        return products + self.scale * (self.base * other).sum() if self.scale else products

    def squared_norm(self) -> Tensor:
        """The sum of squares of the elements."""
        left, right = torch.cat(self.left), torch.cat(self.right)
        squares = ((left @ left.T) * (right @ right.T)).sum()
        if not self.scale:
            return squares
        base = self.scale * self.base
        return squares + 2 * ((left @ base) * right).sum() + base.square().sum()

    def joined(self) -> LowRank:
        """The same matrix in one pair of factors."""
        return LowRank(self.base, self.scale, (torch.cat(self.left),), (torch.cat(self.right),))

    def dense(self) -> Tensor:
        """The (H, D) matrix as a tensor."""
        return self.scale * self.base + sum(left.T @ right for left, right in zip(self.left, self.right, strict=True))


SimulatedUpdate = dict[str, Tensor | LowRank]
"""An update by parameter name; linear layers of the head as low-rank factors."""


def inner(a: Tensor | LowRank, b: Tensor) -> Tensor:
    """<a, b>, the sum of products."""
    return a.inner(b) if isinstance(a, LowRank) else (a * b).sum()


def squared_norm(a: Tensor | LowRank) -> Tensor:
    """|a|^2, the sum of squares."""
    return a.squared_norm() if isinstance(a, LowRank) else a.square().sum()


def squared_distance(a: Tensor | LowRank, b: Tensor) -> Tensor:
    """|a - b|^2."""
    if isinstance(a, LowRank):
        return a.squared_norm() - 2 * a.inner(b) + b.square().sum()
    return (a - b).square().sum()
