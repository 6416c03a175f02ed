"""Each image's activation pattern from the first layer's update alone, for images that share classes.

The first layer's update is `G1 = Delta^T F`, so each row of `Delta` (N x H) lies in the column space of `G1`, and it is
a gate vector in {0, 1}^H times the back-propagated error of its class, one of C vectors. So the gates of an image of
class c are a vertex of the polytope of all vectors with `0 <= gate <= 1` and `gate * error_c` in that space. It is a
degenerate vertex: one constraint is tight for each of H units, where N would suffice. A linear program with a random
objective often ends there. Sums of two images' gates exceed 1, and a class without images has no such vertex. A vertex
that is not an image's gate vector is recognised: rounded to {0, 1} it leaves the space. Labels and their counts follow,
and the search ends when N gate vectors are found.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress
from scipy.optimize import linprog
from torch import Tensor


@dataclass(frozen=True)
class Separation:
    """The gate vectors found, `n <= N` of them.

    Attributes:
        labels: (n,) long, in the order of discovery.
        gates: (n, H) 0 or 1, float64.
        outside: (n,) share of each gated error's norm outside the update's column space, in units of its value for a
            random vector: near 0 for an image's gates, near 1 for others.
    """

    labels: Tensor
    gates: Tensor
    outside: Tensor


def separate(
    rows: Tensor,
    weight: Tensor,
    errors: Tensor,
    num_images: int,
    quota: Tensor,
    exact: bool,
    sure: float = 0.25,
    patience: int = 200,
    seed: int = 0,
) -> Separation:
    """Find the gate vectors of all images, one after another.

    Args:
        rows: (H, r) summed gradient of the first layer.
        weight: (H, r) of the first layer, in the same basis.
        errors: (C, H) back-propagated error of an image of each class, without gates.
        num_images: N, the rank of `rows`.
        quota: (C,) expected number of images of each class, which decides the order of the search.
        exact: whether `quota` is exact, so that no class is searched for more.
        sure: `Separation.outside` below which a gate vector is accepted. Measured: at most 0.02 for images at one local
            step, 0.14 at three; above 0.9 for nearly all others.
        patience: failed searches in a row after which the last image is given up; with k images left, 1 / min(k, 10) of
            them. Measured: up to 131 for the last of 64 images, 32 for the last but one, 9 with ten left.
        seed: of the random objectives.
    """
    live = (rows != 0).any(1)  # units that were active for any image
    search = CornerSearch(rows[live], weight[live], num_images, seed)
    error, expected = errors[:, live].numpy(), quota.double().numpy()
    rounding = math.sqrt(np.finfo(error.dtype).eps)
    chance = math.sqrt(max(1 - num_images / len(search.space), 0.0))
    labels: list[int] = []
    gates: list[np.ndarray] = []
    outsides: list[float] = []
    found, failures, fruitless = np.zeros_like(expected), np.zeros_like(expected), 0
    wanted = min(num_images, int(quota.sum())) if exact else num_images
    with Progress(disable=rank_zero_only.rank > 0) as progress:
        task = progress.add_task("Images disentangled", total=wanted)
        while len(labels) < wanted and fruitless < patience / min(wanted - len(labels), 10):
            priority = expected / (2 * found + 1) / (1 + failures)  # Sainte-Lague, penalised by failures
            label = int(np.where((found < expected) | (not exact), priority, -1).argmax())
            gate = search.corner(error[label])
            gated = gate * error[label]
            inside = gated @ search.space
            size = np.linalg.norm(gated)
            outside = np.linalg.norm(gated - search.space @ inside)
            fresh = np.linalg.norm(search.beyond(inside))
            # a duplicate of a known vertex differs from it outside of the space as much as inside
            if outside < sure * chance * size and fresh > outside + rounding * size:
                search.exclude(inside)
                labels.append(label)
                gates.append(gate)
                outsides.append(outside / (chance * size))
                found[label] += 1
                fruitless = 0
                progress.advance(task)
            else:
                failures[label] += 1
                fruitless += 1
    everywhere = torch.zeros(len(labels), len(rows), dtype=rows.dtype)
    everywhere[:, live] = torch.from_numpy(np.array(gates).reshape(len(labels), len(search.space))).to(rows)
    return Separation(torch.tensor(labels, dtype=torch.long), everywhere, torch.tensor(outsides, dtype=rows.dtype))


class CornerSearch:
    """Searches for gate vectors of one aggregate in directions orthogonal to those that are known.

    Args:
        rows: (H, r) summed gradient of the first layer, of units that were ever active.
        weight: (H, r) of the first layer.
        num_images: N.
        seed: of the random objectives.
        tolerance: share of an error's root mean square by which a gated error may violate its bounds, because images of
            one class have slightly different errors. From 0.01 to 0.2 the results are the same.
    """

    def __init__(self, rows: Tensor, weight: Tensor, num_images: int, seed: int, tolerance: float = 0.03) -> None:
        space = torch.linalg.svd(rows, full_matrices=False)[0][:, :num_images]
        self.space = space.numpy()
        #: (H, N): maps a point of the space to the pre-activations of the features sum_n (point . Delta_n) f_n
        self.response = (weight @ (rows.T @ space)).numpy()
        self.random = np.random.default_rng(seed)
        self.tolerance = tolerance
        #: (N, n) orthonormal basis of the known gated errors
        self.known = np.zeros((num_images, 0))

    def beyond(self, inside: np.ndarray) -> np.ndarray:
        """(N,) component of coordinates that is orthogonal to the known ones."""
        return inside - self.known @ (self.known.T @ inside)

    def exclude(self, inside: np.ndarray) -> None:
        """Add coordinates (N,) to the known ones."""
        self.known = np.linalg.qr(np.column_stack([self.known, inside]))[0]

    def corner(self, error: np.ndarray, iterations: int = 12) -> np.ndarray:
        """(H,) gates in {0, 1} near a vertex of the polytope of a class's `error` (H,).

        The start is a direction orthogonal to the known images: used as the objective, or converted to gates through
        the features that it selects. From there on the objective is the gradient of the squared distance to gates of
        1/2, whose maxima are vertices (Frank-Wolfe).
        """
        sided = np.sign(error)[:, None] * self.space
        constraints = np.concatenate([sided, -sided])
        slack = self.tolerance * math.sqrt((error**2).mean())
        bounds = np.concatenate([np.abs(error) + slack, np.full(len(error), slack)])
        direction = self.beyond(self.random.exponential(size=len(error)) @ sided)
        gate = np.zeros(len(error))
        if self.random.uniform() < 0.5:
            gate = (self.response @ direction > 0).astype(float)
            direction = ((2 * gate - 1) * np.abs(error)) @ sided
        for _ in range(iterations):
            result = linprog(-direction, constraints, bounds, bounds=(None, None), method="highs-ds")
            if result.x is None:
                break
            snapped = (sided @ result.x > np.abs(error) / 2).astype(float)
            if (snapped == gate).all():
                break
            gate = snapped
            direction = ((2 * gate - 1) * np.abs(error)) @ sided
        return gate
