"""The input maps of a convolution from its update, of a single local step or few.

The gradient of a convolution's weight is `Delta^T X`, a sum over the images' positions of back-propagated errors times
patches of its input. Where an update shows N images at P positions each, and N P is at most the number of output
channels, its row space is that of all patches. A map is consistent if each of its pixels has the same value in all
patches that hold it, and is 0 in the padding. Maps of which all patches lie in the row space are linear combinations of
the images': they are eigenvectors of eigenvalue 1 of `U^T Pi U`, where U makes patches of a map and Pi projects on the
row space. The images' maps are those with most zeros, since they are behind a ReLU (`sparse_features.py`).

Neither rates nor labels nor other layers are used. In front of BatchNorm in train mode the errors of a batch add up to
0, so that only differences of patches are seen, and each peer's batch lowers the rank by one, which tells their number.
Images are then found up to a constant for each channel at the pixels that a single tap sees, if there are such, as at
stride 2. There, differences of two images of one peer, moved by the stride, are consistent as well; they are not
positive, so that the sparsest vectors are the images' still. Whose images trained together, and how large they are
beside each other, follows from the difference of their mean patches, which the row space holds for images of one peer
alone.

The sign of a single map is that of its sum where maps are mostly positive. Elsewhere, as of the images themselves after
normalisation, it is left to the head's features, and the map is not taken where these are the same for both signs.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.analytic.sparse_features import sparsest_rows

MOST_OF_PATCH = 0.5
"""Rank over the entries of a patch, up to which consistency leaves nothing but the images' maps."""
MOST_ITERATIONS = 300
TOLERANCE = 1e-7
"""Of an eigenvector's residual."""
FURTHER = 3
"""Eigenvalues beyond those of the images, by which it is told whether these stand out."""
CONSISTENT = 3e-3
"""Distance of an eigenvalue to 1 up to which its map is consistent. Measured: 1e-12 to 1e-4; else 1e-3 to 0.4."""
STANDS_OUT = 20.0
"""Factor from the images' to the next one. Measured: 90 and more."""
ALWAYS = 1e-9
"""Distance to 1 of eigenvalues that no update changes."""
NEARLY_ZERO = 3e-3
"""Entry over the mean positive one, that is taken as 0. The search leaves 2e-4 of a map."""
TOGETHER = 0.99
"""Cosine of what two images' mean patches have outside of the row space, from which they trained together. Measured:
1 to five digits of these, at most 0.7 of others."""


class Convolution(NamedTuple):
    """A convolution and the maps that pass through it.

    Attributes:
        name: of the module.
        layer: the module.
        map_shape: (c, h, w) of its input.
        behind: name of the BatchNorm layer that takes its outputs and normalises by batch statistics; None without.
        positive: whether the maps have mostly positive entries, as behind a ReLU.
    """

    name: str
    layer: nn.Conv2d
    map_shape: tuple[int, int, int]
    behind: str | None = None
    positive: bool = True

    @property
    def centred(self) -> bool:
        """Whether errors add up to 0, as in front of BatchNorm by batch statistics."""
        return self.behind is not None

    @property
    def geometry(self) -> dict[str, tuple[int, ...]]:
        """Arguments of `fold` and `unfold`."""
        return {"kernel_size": self.layer.kernel_size, "padding": self.layer.padding, "stride": self.layer.stride}

    @property
    def positions(self) -> int:
        """P, of the output."""
        sides = zip(self.map_shape[1:], *self.geometry.values(), strict=True)
        return int(np.prod([(side + 2 * pad - kernel) // stride + 1 for side, kernel, pad, stride in sides]))

    def rank(self, images: int, peers: int = 1) -> int:
        """Of the update of so many images, of so many peers."""
        return images * self.positions - self.centred * peers

    def consistent(self, images: int) -> int:
        """Most maps that can be consistent with so many images: their own, and moved differences."""
        own = images == 1 or not self.centred
        return images if own else images + (self.positions - 1) * (images - 1)

    def shows(self, images: int) -> bool:
        """Whether its update can determine the maps of so many images."""
        plain = self.layer.groups == 1 and set(self.layer.dilation) == {1} and self.layer.padding_mode == "zeros"
        if not plain or isinstance(self.layer.padding, str) or self.map_shape[1:] == (1, 1):
            return False  # a single pixel is no map, as of the means that squeeze-and-excitation takes
        strided = self.layer.stride != (1, 1) and not self.centred
        if images > 1 and strided:  # moved maps are consistent too, and sparser
            return False
        out, _, *kernel = self.layer.weight.shape
        patch = self.map_shape[0] * int(np.prod(kernel))
        return 0 < self.rank(images) <= min(out, MOST_OF_PATCH * patch)


class Maps(NamedTuple):
    """What a convolution's update shows of its input.

    Attributes:
        maps: (N, c, h, w) of unit norm, in any order, without what is not seen.
        unseen: (k, h, w) orthonormal; multiples of these in each channel are not seen.
        uncertainty: expected relative error of a map.
        signed: whether the maps' signs are known, else that of the only one is not.
        peers: (N,) long, in front of BatchNorm: images with the same number trained together. Their maps have the right
            size beside each other, and are right up to multiples of `unseen` that they share. None elsewhere.
    """

    maps: Tensor
    unseen: Tensor
    uncertainty: float
    signed: bool
    peers: Tensor | None = None


def read_maps(update: Tensor, convolution: Convolution, images: int) -> Maps | None:
    """The input maps of so many images; None where the update does not determine them.

    Args:
        update: (out, c, kh, kw) of the weight.
        convolution: of which `shows(images)` is true.
        images: N.
    """
    (channels, height, width), kernel = convolution.map_shape, convolution.geometry
    rows = _row_space(update, convolution, images)
    covered = _covered(convolution)
    if not covered.all():  # the output does not depend on the others
        return None
    weight = covered.rsqrt()  # of a vector, which so has the norm of its patches

    def patches(maps: Tensor) -> Tensor:
        return F.unfold(maps * weight, **kernel).transpose(1, 2)

    def folded(parts: Tensor) -> Tensor:
        return F.fold(parts.transpose(1, 2), (height, width), **kernel) * weight

    def seen(maps: Tensor) -> Tensor:
        """Maps (n, c, h, w) without what no update shows."""
        flat = maps.flatten(2)
        return (flat - flat @ unseen.T @ unseen).view_as(maps)

    unseen = _unseen(convolution, weight)

    def consistent(vectors: np.ndarray) -> np.ndarray:
        columns = vectors.reshape(channels * height * width, -1).T
        columns = torch.from_numpy(np.ascontiguousarray(columns, np.float64))  # a small problem comes in integers
        parts = patches(seen(columns.view(-1, channels, height, width)))
        mean = parts.mean(1, keepdim=True) * convolution.centred
        parts = (parts - mean) @ rows.T @ rows + mean
        return seen(folded(parts)).flatten(1).T.numpy()

    size = channels * height * width
    most = convolution.consistent(images)
    start = np.random.default_rng(0).standard_normal((size, most + FURTHER))
    operator = LinearOperator((size, size), matvec=consistent, matmat=consistent, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the further ones need not converge
        values, vectors = lobpcg(operator, start, largest=True, tol=TOLERANCE, maxiter=MOST_ITERATIONS)
    order = np.argsort(-values)
    distances = np.maximum(1 - values[order], np.finfo(float).eps)
    count = images + int(np.argmax(distances[images : most + 1] / distances[images - 1 : most]))
    off = distances[count - 1]
    if off > CONSISTENT or distances[count] < STANDS_OUT * off:
        return None
    unseen = unseen_maps(convolution)
    basis = torch.from_numpy(vectors[:, order[:count]].T.copy()).view(count, channels, height, width) * weight
    basis = basis.flatten(2)
    basis = torch.linalg.qr((basis - basis @ unseen.flatten(1).T @ unseen.flatten(1)).flatten(1).T).Q.T
    whole = unseen.flatten(1).square().sum(0) < ALWAYS  # pixels of which a zero is seen as such
    entries = basis.view(count, channels, -1)[:, :, whole].flatten(1)
    total = entries.sum(1, keepdim=True)
    found = sparsest_rows(entries, images) if images > 1 else torch.where(total < 0, -1.0, 1.0).to(basis)
    if len(found) < images:
        return None
    if images > 1:
        found = _sharpened(found, entries)
    maps = F.normalize(found @ basis, dim=1).view(images, channels, height, width)
    signed = images > 1 or (convolution.positive and bool(total.any()))
    peers = torch.zeros(1, dtype=torch.long) if convolution.centred and signed and images == 1 else None
    if convolution.centred and images > 1:
        if (together := _peers(maps, unseen, rows, convolution)) is None:
            return None
        maps, peers = together
    return Maps(maps, unseen, off**0.5, signed, peers)


def unseen_maps(convolution: Convolution) -> Tensor:
    """(k, h, w) orthonormal; multiples of these in each channel are not seen in front of BatchNorm."""
    weight = _covered(convolution).rsqrt()
    unseen = _unseen(convolution, weight) * weight.flatten()
    return torch.linalg.qr(unseen.T).Q.T.reshape(-1, *convolution.map_shape[1:])


def _unseen(convolution: Convolution, weight: Tensor) -> Tensor:
    """(k, h w) the same of maps over the `weight`."""
    height, width = convolution.map_shape[1:]
    single = torch.eye(height * width, dtype=torch.float64)
    if not convolution.centred:
        return single[:0]
    patches = F.unfold(single.view(-1, 1, height, width) * weight, **convolution.geometry)
    means = patches.mean(2, keepdim=True).expand_as(patches)
    folded = F.fold(means, (height, width), **convolution.geometry) * weight
    values, vectors = torch.linalg.eigh(folded.flatten(1))
    return vectors[:, values > 1 - ALWAYS].T


def _covered(convolution: Convolution) -> Tensor:
    """(1, 1, h, w) in how many patches each pixel is."""
    ones = torch.ones(1, 1, *convolution.map_shape[1:], dtype=torch.float64)
    return F.fold(F.unfold(ones, **convolution.geometry), ones.shape[2:], **convolution.geometry)


def _sharpened(found: Tensor, entries: Tensor) -> Tensor:
    """The same vectors (N, M), by the entries (M, D) that are nearly 0 alone, of which they then have least."""
    sharp = []
    for vector in found:
        shown = vector @ entries
        zeros = entries[:, shown.abs() < NEARLY_ZERO * shown.clamp_min(0).mean()]
        nearest = torch.linalg.svd(zeros, full_matrices=True).U[:, -1]
        sharp.append(nearest * (nearest @ vector).sign())
    return torch.stack(sharp)


def _row_space(update: Tensor, convolution: Convolution, images: int) -> Tensor:
    """(r, patch) orthonormal rows of an update's leading directions, as many as the likely number of peers leaves."""
    _, values, rows = torch.linalg.svd(update.double().cpu().flatten(1), full_matrices=False)
    if images == 1 or not convolution.centred:
        return rows[: convolution.rank(images)]
    ranks = [rank for peers in range(1, images + 1) if (rank := convolution.rank(images, peers)) < len(values)]
    falls = [values[rank - 1] / values[rank].clamp_min(torch.finfo(values.dtype).tiny) for rank in ranks]
    return rows[: ranks[int(np.argmax(falls))] if ranks else len(values)]


def _peers(maps: Tensor, unseen: Tensor, rows: Tensor, convolution: Convolution) -> tuple[Tensor, Tensor] | None:
    """The maps (N, c, h, w) in right proportion, and (N,) their peers; None where that contradicts the rank."""
    channels = maps.shape[1]

    def outside(of: Tensor) -> Tensor:
        """(n, patch) what mean patches have outside of the row space."""
        means = F.unfold(of, **convolution.geometry).mean(2)
        return means - means @ rows.T @ rows

    every = torch.eye(channels).to(maps)[:, None, :, None, None] * unseen[None, :, None]
    constants = every.flatten(0, 1)  # (c k, c, h, w)
    shown, free = outside(maps), outside(constants)
    inside = torch.linalg.svd(free, full_matrices=False).Vh if len(free) else free
    left = shown - shown @ inside.T @ inside
    cosines = F.normalize(left, dim=1) @ F.normalize(left, dim=1).T
    peers = (cosines > TOGETHER).double().argmax(1)  # the first image that it trained with
    members = peers.unique()
    if len(rows) != convolution.rank(len(maps), len(members)) or not (peers[members] == members).all():
        return None
    size = left.norm(dim=1)[:, None]
    maps = maps / size[:, :, None, None]
    if len(free):
        differences = (shown / size)[peers] - shown / size
        maps = maps + torch.einsum("nk,kchw->nchw", torch.linalg.lstsq(free.T, differences.T).solution.T, constants)
    return maps, torch.unique(peers, return_inverse=True)[1]
