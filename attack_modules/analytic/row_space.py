"""A layer's update in coordinates of its own row space, whose dimension is far below the number of features."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

WIDE = 1024
"""Outputs and inputs of a layer from which only the leading directions of its update are computed."""
LEADING = 128
"""Directions that are computed first; twice as many where the singular values still fall."""
FLAT = 2.0
"""Fall of the singular values over the later half of the directions up to which none is missing. Those of rounding
fall by less than 1.1 there."""
POWER_ITERATIONS = 2
"""Of the randomised range finder (Halko, Martinsson, Tropp 2011); images lie far above the rounding."""
CHUNK = 2**22
"""Entries that are held in float64 at once."""
BLOCK = 128
"""Rows of a gram matrix that are computed at once."""

Layer = tuple[Tensor, ...]
"""The weight (out, in) of a linear layer, and its bias (out,) if it has one."""


def linear_layers(parameters: Mapping[str, Tensor]) -> list[Layer]:
    """The parameters of a head, layer by layer."""
    layers: list[Layer] = []
    for parameter in parameters.values():
        if parameter.ndim == 2:
            layers.append((parameter,))
        else:
            layers[-1] = (*layers[-1], parameter)
    return layers


def joined(layer: Layer) -> Tensor:
    """(out, in) matrix, (out, in + 1) with a bias, which is the weight of a feature that is always 1."""
    return torch.cat([layer[0], layer[1][:, None]], 1) if len(layer) > 1 else layer[0]


def augmented(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """One matrix a layer, see `joined`."""
    return [joined(layer) for layer in linear_layers(parameters)]


@dataclass(frozen=True)
class RowSpace:
    """A layer's update, and its weights, in an orthonormal basis of the update's row space, or its leading part.

    Attributes:
        update: (out, D).
        mixing: (r, out) float64, so that the rows of `mixing @ update` are an orthonormal basis.
        rows: (out, r) float64, the update in that basis; exactly 0 of units that were never active.
        weight: (out, r) float64, the layer's weight before the round, in that basis.
        floor: smallest singular value that the precision of the weights resolves.
        rest: (out,) float64, squared norm of each row of the update outside the basis.
        spacing: of floating-point numbers as large as the weights.
    """

    update: Tensor
    mixing: Tensor
    rows: Tensor
    weight: Tensor
    floor: float
    rest: Tensor
    spacing: float

    @classmethod
    def of(cls, update: Tensor, weight: Tensor) -> "RowSpace":
        precision, spacing = torch.finfo(weight.dtype).eps, float_spacing(weight)
        if min(update.shape) <= WIDE:
            rows, mixing = row_coordinates(update, precision)
            within = product(weight, update) @ mixing.T
            rest = torch.zeros_like(rows[:, 0])
        else:
            mixing, basis = leading_directions(update)
            rows, within = times(update, basis), times(weight, basis)
            squares = torch.cat([part.square().sum(1) for part in chunks(update)])
            rest = (squares - rows.square().sum(1)).clamp_min(0)
        floor = precision * (rows.square().sum() + rest.sum()).sqrt().item()
        # arithmetic beside the training, such as a strategy's own noise of 1e-12, leaves rows below the floor
        active = torch.linalg.vector_norm(rows, dim=1) > floor
        return cls(update, mixing, rows * active[:, None], within, floor, rest * active, spacing)

    def vectors(self, coordinates: Tensor) -> Tensor:
        """(N, r) coordinates -> (N, D) vectors."""
        return transposed_times(self.update, (coordinates @ self.mixing).T).T

    def coordinates(self, vectors: Tensor) -> Tensor:
        """(N, D) vectors -> (N, r) coordinates of their part in the basis."""
        return times(self.update, vectors.T).T @ self.mixing.T

    def residual(self, errors: Tensor, coordinates: Tensor, scale: float = 1.0) -> float:
        """Relative Frobenius norm of what `errors.T @ vectors(coordinates)` leaves of `scale` times the update."""
        left = (scale * self.rows - errors.T @ coordinates).square().sum() + scale**2 * self.rest.sum()
        return (left.sqrt() / (self.rows.square().sum() + self.rest.sum()).sqrt() / scale).item()

    def part(self, count: int) -> "RowSpace":
        """The first `count` rows alone."""
        return replace(self, rows=self.rows[:count], weight=self.weight[:count], rest=self.rest[:count])

    @cached_property
    def singular(self) -> Tensor:
        """Singular values of the update, one for each unit that was ever active, clamped to the floor."""
        return torch.linalg.svdvals(self.rows[self.rows.any(1)]).clamp_min(self.floor)


def float_spacing(weight: Tensor) -> float:
    """Typical distance of neighbouring floating-point numbers at the size of a tensor's entries."""
    return torch.finfo(weight.dtype).eps * (torch.linalg.vector_norm(weight, 1) / weight.numel()).item()


def space_bytes(weight: Tensor) -> int:
    """Bytes that `RowSpace.of` certainly holds at once of such a layer, which may be on the meta device.

    The update and the weight, each with its bias.
    """
    return 2 * weight.numel() * weight.element_size()


def row_coordinates(update: Tensor, precision: float | None = None) -> tuple[Tensor, Tensor]:
    """An update in coordinates of its own row space: `rows` (out, r), and `mixing` (r, out).

    `update = rows @ basis` with the orthonormal `basis = mixing @ update`, which would be as large as the update and
    is never formed. The basis are the right singular vectors, so that rounding noise, which has singular values of its
    own, does not mix into the other directions.

    Args:
        update: (out, D); it is read once, some columns at a time.
        precision: relative size of singular values that count as 0, by default float64's; their rows of `mixing` are
            0.
    """
    eps = torch.finfo(torch.float64).eps
    if precision is None or precision < eps**0.5 or len(update) > update.shape[1]:
        triangle = torch.zeros(0, len(update), dtype=torch.float64, device=update.device)
        for part in columns(update, least=len(update)):
            triangle = torch.linalg.qr(torch.cat([triangle, part.T]), mode="r").R
        left, singular, right = torch.linalg.svd(triangle.T, full_matrices=False)
        rows = triangle.T @ right.T  # those of inactive units stay exactly 0
    else:  # their squares are resolved as well, in half the time
        squares, left = torch.linalg.eigh(gram(update))
        singular, left = squares.flip(0).clamp_min(0).sqrt(), left.flip(1)
        rows = left * singular
    least = (eps if precision is None else precision) * singular.norm()
    return rows, (left * torch.where(singular > least, 1 / singular, 0.0)).T


def gram(matrix: Tensor) -> Tensor:
    """`matrix @ matrix.T` in float64, of which one half is computed, block by block, and the matrix is read once."""
    count = len(matrix)
    found = torch.zeros(count, count, dtype=torch.float64, device=matrix.device)
    for part in columns(matrix):
        for start in range(0, count, BLOCK):
            end = start + BLOCK
            found[start:end, :end].addmm_(part[start:end], part[:end].T)
    return found.tril() + found.tril(-1).T


def product(one: Tensor, other: Tensor) -> Tensor:
    """`one @ other.T` in float64, where both are of float32 summed up in parts that are rounded to it."""
    wide = max(CHUNK // max(len(one), len(other)), 1)
    kind = torch.promote_types(one.dtype, other.dtype)
    parts = zip(one.split(wide, 1), other.split(wide, 1), strict=True)
    return sum((a.to(kind) @ b.to(kind).T).double() for a, b in parts)


def leading_directions(update: Tensor) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors of a wide layer's update, as many as stand above its rounding and more.

    Args:
        update: (out, D); it is read several times, in chunks.

    Returns:
        `mixing` (r, out) and the orthonormal basis (D, r), which is `(mixing @ update).T`.
    """
    count, most = LEADING, min(update.shape)
    generator = torch.Generator().manual_seed(0)
    while True:
        sketch = torch.randn(update.shape[1], count, generator=generator, dtype=torch.float64).to(update.device)
        for _ in range(POWER_ITERATIONS):
            outputs = torch.linalg.qr(times(update, sketch)).Q
            sketch, triangle = torch.linalg.qr(transposed_times(update, outputs))
        left, singular, right = torch.linalg.svd(triangle.T, full_matrices=False)
        # the update is nearly `outputs @ triangle.T @ sketch.T`
        if count == most or singular[count // 2] < FLAT * singular[-1]:
            break
        count = min(2 * count, most)
    inverse = torch.where(singular > torch.finfo(torch.float64).eps * singular.norm(), 1 / singular, 0.0)
    return (outputs @ (left * inverse)).T, sketch @ right.T


def chunks(matrix: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix, some at a time, in float64."""
    return (part.double() for part in matrix.split(max(CHUNK // matrix.shape[1], 1)))


def columns(matrix: Tensor, least: int = 1) -> Iterator[Tensor]:
    """The columns of a matrix, some at a time, in float64; at least so many."""
    return (part.double() for part in matrix.split(max(CHUNK // len(matrix), least), dim=1))


def times(matrix: Tensor, other: Tensor) -> Tensor:
    """`matrix @ other` in float64, without a copy of the matrix."""
    return torch.cat([part @ other for part in chunks(matrix)])


def transposed_times(matrix: Tensor, other: Tensor) -> Tensor:
    """`matrix.T @ other` in float64, without a copy of the matrix."""
    return torch.cat([other.T @ part for part in columns(matrix)], 1).T
