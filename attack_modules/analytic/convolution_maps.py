"""The input maps of a convolution from its update, of a single local step or few.

The gradient of a convolution's weight is `Delta^T X`, a sum over the images' positions of back-propagated errors times
patches of its input. Where an update shows N images at P positions each, and N P is at most the number of output
channels, its row space is that of all patches. A map is consistent if each of its pixels has the same value in all
patches that hold it, and is 0 in the padding. Maps of which all patches lie in the row space are linear combinations of
the images': they are eigenvectors of eigenvalue 1 of `U^T Pi U`, where U makes patches of a map and Pi projects on the
row space. The images' maps are those with most zeros, since they are behind a ReLU (`sparse_features.py`).

Neither rates nor labels nor other layers are used. In front of BatchNorm in train mode the errors of a batch add up to
0, so that only differences of patches are seen. A single image is then found up to a constant for each channel at the
pixels that a single tap sees, if there are such, as at stride 2.
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


class Convolution(NamedTuple):
    """A convolution and the maps that pass through it.

    Attributes:
        name: of the module.
        layer: the module.
        map_shape: (c, h, w) of its input.
        behind: name of the BatchNorm layer that takes its outputs and normalises by batch statistics; None without.
    """

    name: str
    layer: nn.Conv2d
    map_shape: tuple[int, int, int]
    behind: str | None = None

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

    def rank(self, images: int) -> int:
        """Of the update of so many images."""
        return images * (self.positions - self.centred)

    def shows(self, images: int) -> bool:
        """Whether its update can determine the maps of so many images."""
        plain = self.layer.groups == 1 and set(self.layer.dilation) == {1} and self.layer.padding_mode == "zeros"
        if not plain or isinstance(self.layer.padding, str):
            return False
        if images > 1 and (self.centred or self.layer.stride != (1, 1)):  # at stride 2 other maps are consistent too
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
    """

    maps: Tensor
    unseen: Tensor
    uncertainty: float


def read_maps(update: Tensor, convolution: Convolution, images: int) -> Maps | None:
    """The input maps of so many images; None where the update does not determine them.

    Args:
        update: (out, c, kh, kw) of the weight.
        convolution: of which `shows(images)` is true.
        images: N.
    """
    (channels, height, width), kernel = convolution.map_shape, convolution.geometry
    rows = torch.linalg.svd(update.double().cpu().flatten(1), full_matrices=False).Vh[: convolution.rank(images)]
    ones = torch.ones(1, 1, height, width, dtype=torch.float64)
    covered = F.fold(F.unfold(ones, **kernel), (height, width), **kernel)
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

    unseen = ones.new_zeros(0, height * width)
    if convolution.centred:
        single = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
        means = patches(single).mean(1, keepdim=True).expand(-1, convolution.positions, -1)
        values, vectors = torch.linalg.eigh(folded(means).flatten(1))
        unseen = vectors[:, values > 1 - ALWAYS].T

    def consistent(vectors: np.ndarray) -> np.ndarray:
        columns = torch.from_numpy(np.ascontiguousarray(vectors.reshape(channels * height * width, -1).T))
        parts = patches(seen(columns.view(-1, channels, height, width)))
        mean = parts.mean(1, keepdim=True) * convolution.centred
        parts = (parts - mean) @ rows.T @ rows + mean
        return seen(folded(parts)).flatten(1).T.numpy()

    size = channels * height * width
    start = np.random.default_rng(0).standard_normal((size, images + FURTHER))
    operator = LinearOperator((size, size), matvec=consistent, matmat=consistent, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the further ones need not converge
        values, vectors = lobpcg(operator, start, largest=True, tol=TOLERANCE, maxiter=MOST_ITERATIONS)
    order = np.argsort(-values)
    off, further = (max(1 - values[order[place]], np.finfo(float).eps) for place in (images - 1, images))
    if off > CONSISTENT or further < STANDS_OUT * off:
        return None
    unseen = torch.linalg.qr((unseen * weight.flatten()).T).Q.T
    basis = torch.from_numpy(vectors[:, order[:images]].T.copy()).view(images, channels, height, width) * weight
    basis = torch.linalg.qr(seen(basis).flatten(1).T).Q.T
    whole = unseen.square().sum(0) < ALWAYS  # pixels of which a zero is seen as such
    entries = basis.view(images, channels, -1)[:, :, whole].flatten(1)
    found = sparsest_rows(entries, images) if images > 1 else entries.sum(1, keepdim=True).sign()
    if len(found) < images:
        return None
    maps = F.normalize(found @ basis, dim=1).view(images, channels, height, width)
    return Maps(maps, unseen.view(-1, height, width), off**0.5)
