"""Features of single images as the sparsest vectors of the row space of the first layer's update.

Features behind a ReLU are not negative, and many are exactly 0, of each image others. The row space of `G1 = Delta^T F`
is that of the images' features, in which sums and differences have fewer zeros or negative entries. So the images are
the vectors of this space with most zeros and without negative entries, which is sparse dictionary learning in a known
subspace (Spielman, Wang and Wright, 2012). It needs no gates, labels, classes or rates, and images may differ in few
units; local steps blur it only as far as features change.

Each search minimises the weighted squares of the entries, negative ones with weight 1, others with less the larger they
are (iteratively reweighted least squares), along a random direction that images found before do not have.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.row_space import RowSpace

COLUMNS = 4096
"""Features that are looked at, evenly spaced among all."""
STARTS = 24
"""Random directions a sweep."""
SWEEPS = 40
"""Upper limit; each sweep but the last finds an image or more as a rule."""
COARSE = tuple(0.3 * 0.03 ** (i / 19) for i in range(20))
"""Size of an entry, in units of the mean positive one, from which it weighs less; falling."""
FINE = tuple(0.05 * 0.2 ** (i / 9) for i in range(10))
"""The same from a vector that is nearly an image's."""
ZERO = 0.05
"""Size up to which an entry counts as 0, in the same units."""
FINER = tuple(0.008 * 0.25 ** (i / 7) for i in range(8))
"""In place of `FINE` for a head's features: from 0.05 on, an image can end at another that is 0.2 away and has more
zeros."""
FINER_ZERO = 0.015
"""In place of `ZERO` for a head's features, of which drift over three steps leaves 0.006 or less."""
NEAR_BEST = 0.93
"""Share of the zeros of a sweep's sparsest vector from which a vector is taken. Images differ by 10 %; sums of two have
60 to 80 % of an image's zeros."""
LEAST_ZEROS = 0.1
"""Share of zeros below which a vector is not sparse. Measured: 0.17 to 0.37 for radiographs under LeNet5."""
NEGATIVE = 0.1
"""Share of a vector's norm in negative entries from which it is no image's. Measured: 0.001 for images."""
APART = 0.05
"""Share of a unit vector outside the images found, from which it is another. Measured: 0.06 or more for 64 images."""


def sparsest_features(space: RowSpace, num_images: int, further: int = 0) -> Tensor:
    """Directions (n, r) of the features of `n <= N` images, as unit coordinates in the row space.

    Args:
        space: of the first layer's update.
        num_images: N.
        further: directions beyond the first N that may hold a part of the images, as by the images' common drift.
    """
    inside = torch.linalg.svd(space.rows, full_matrices=False).Vh[: num_images + further]
    return sparsest_rows(space.vectors(inside), num_images, FINER, FINER_ZERO) @ inside


def sparsest_rows(basis: Tensor, num_images: int, fine: Sequence[float] = FINE, zero: float = ZERO) -> Tensor:
    """Unit coordinates (n, M) of the `n <= N` images' vectors in a basis (M, D) of a space that holds them.

    Args:
        basis: of vectors that are not negative and of which many entries are 0, and maybe of others, `M >= N`.
        num_images: N.
        fine: sizes of entries from which they weigh less, of vectors that are nearly an image's; falling.
        zero: size up to which an entry counts as 0.
    """
    basis = basis[:, :: max(basis.shape[1] // COLUMNS, 1)]
    size = basis.norm(dim=0)
    basis = basis[:, size > 1e-3 * size.max()]
    found = basis.new_zeros(0, len(basis))
    generator = torch.Generator().manual_seed(0)
    with Progress(disable=rank_zero_only.rank > 0) as progress:
        task = progress.add_task("Sparse features", total=num_images)
        for _ in range(SWEEPS):
            new = _sweep(basis, found, num_images, generator, fine, zero)
            found = torch.cat([found, new])
            progress.update(task, completed=len(found))
            if len(found) == num_images or not len(found):
                break
    return found


def _sweep(
    basis: Tensor, found: Tensor, num_images: int, generator: torch.Generator, fine: Sequence[float], zero: float
) -> Tensor:
    """(k, M) unit vectors of further images, in coordinates of a `basis` (M, D), beyond those of `found` (n, M)."""
    whole = torch.eye(len(basis)).to(basis)
    others = torch.linalg.svd(found, full_matrices=True).Vh[len(found) :] if len(found) else whole
    drawn = torch.randn(STARTS, len(others), generator=generator, dtype=torch.float64).to(basis)
    kept = F.normalize(drawn @ others, dim=1)
    start = kept
    if len(found):  # images that are alike have zeros in common
        alike = torch.randint(len(found), (STARTS // 2,), generator=generator)
        start = torch.cat([kept[: STARTS - len(alike)], found[alike]])
    vectors = sparser(basis, start, COARSE, kept)
    vectors = sparser(basis, vectors, fine, within=others)
    free = sparser(basis, vectors, fine)  # more exact, but may end at one that was found
    vectors = torch.where((free @ others.T).norm(dim=1, keepdim=True) > APART, free, vectors)
    entries = vectors @ basis
    negative = entries.clamp_max(0).norm(dim=1) / entries.norm(dim=1)
    zeros = (_in_units(entries).abs() < zero).double().mean(1)
    fit = ((vectors @ others.T).norm(dim=1) > APART) & (negative < NEGATIVE) & (zeros > LEAST_ZEROS)
    taken = found
    for i in zeros.argsort(descending=True).tolist():
        if len(taken) < num_images and fit[i] and zeros[i] > NEAR_BEST * zeros[fit].max():
            covered = torch.linalg.qr(taken.T).Q
            if (vectors[i] - covered @ (covered.T @ vectors[i])).norm() > APART:
                taken = torch.cat([taken, vectors[i : i + 1]])
    return taken[len(found) :]


def sparser(
    basis: Tensor, vectors: Tensor, sizes: Sequence[float], kept: Tensor | None = None, within: Tensor | None = None
) -> Tensor:
    """(K, N) unit vectors with more zeros and less negative entries than `vectors` (K, N), and near them.

    Args:
        basis: (N, D), in which the vectors are coordinates.
        vectors: starts.
        sizes: of entries from which on they weigh less, one for each iteration.
        kept: (K, N) directions along which the vectors keep their size; None for their own of the iteration before.
        within: (M, N) orthonormal, to which these directions are confined; None for all.
    """
    for size in sizes:
        entries = _in_units(vectors @ basis)
        weight = torch.where(entries < 0, 1.0, size**2 / (size**2 + entries.square()))
        gram = torch.stack([(basis * own) @ basis.T for own in weight])
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += max(1e-10, torch.finfo(gram.dtype).eps) * diagonal.sum(1, keepdim=True)
        along = kept
        if along is None:
            along = vectors if within is None else vectors @ within.T @ within
        vectors = torch.linalg.solve(gram, along)
        vectors = F.normalize(vectors * (vectors * along).sum(1, keepdim=True).sign(), dim=1)
    return vectors


def zeros_of(space: RowSpace, coordinates: Tensor) -> Tensor:
    """(N,) share of the features, given by coordinates (N, r) in the row space, that are nearly 0."""
    vectors = space.vectors(coordinates)
    return (_in_units(vectors).abs() < FINER_ZERO).double().mean(1)


def _in_units(entries: Tensor) -> Tensor:
    """Entries (K, D) in units of each row's mean positive part."""
    return entries / entries.clamp_min(0).mean(1, keepdim=True)
