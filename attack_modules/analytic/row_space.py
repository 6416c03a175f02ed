"""A layer's update in coordinates of its own row space, whose dimension is far below the number of features."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


def augmented(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """One (out, in) matrix a layer, (out, in + 1) with a bias, which is the weight of a feature that is always 1."""
    layers: list[Tensor] = []
    for parameter in parameters.values():
        if parameter.ndim == 2:
            layers.append(parameter)
        else:
            layers[-1] = torch.cat([layers[-1], parameter[:, None]], 1)
    return layers


@dataclass(frozen=True)
class RowSpace:
    """A layer's update, and its weights, in an orthonormal basis of the update's r-dimensional row space.

    Attributes:
        update: (out, D) float64.
        mixing: (r, out), so that the rows of `mixing @ update` are an orthonormal basis.
        rows: (out, r) the update in that basis.
        weight: (out, r) the layer's weight before the round, in that basis.
        floor: smallest singular value that the precision of the weights resolves.
    """

    update: Tensor
    mixing: Tensor
    rows: Tensor
    weight: Tensor
    floor: float

    @classmethod
    def of(cls, update: Tensor, weight: Tensor) -> "RowSpace":
        update, precision = update.double(), torch.finfo(weight.dtype).eps
        rows, mixing = row_coordinates(update, precision)
        return cls(update, mixing, rows, weight.double() @ update.T @ mixing.T, precision * rows.norm().item())

    def vectors(self, coordinates: Tensor) -> Tensor:
        """(N, r) coordinates -> (N, D) vectors."""
        return coordinates @ self.mixing @ self.update

    def part(self, count: int) -> "RowSpace":
        """The first `count` rows alone."""
        return replace(self, rows=self.rows[:count], weight=self.weight[:count])

    @cached_property
    def singular(self) -> Tensor:
        """Singular values of the update, one for each unit that was ever active, clamped to the floor."""
        return torch.linalg.svdvals(self.rows[(self.rows != 0).any(1)]).clamp_min(self.floor)


def row_coordinates(update: Tensor, precision: float | None = None) -> tuple[Tensor, Tensor]:
    """An update in coordinates of its own row space: `rows` (out, r), and `mixing` (r, out).

    `update = rows @ basis` with the orthonormal `basis = mixing @ update`, which would be as large as the update and
    is never formed. The basis are the right singular vectors, so that rounding noise, which has singular values of its
    own, does not mix into the other directions.

    Args:
        update: (out, D) float64.
        precision: relative size of singular values that count as 0, by default float64's; their rows of `mixing` are
            0.
    """
    rows = torch.linalg.qr(update.T, mode="r").R.T
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    least = (torch.finfo(update.dtype).eps if precision is None else precision) * singular.norm()
    scale = torch.where(singular > least, 1 / singular, 0.0)
    return rows @ right.T, (left * scale).T  # rows of inactive units stay exactly 0
