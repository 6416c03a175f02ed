"""Features where each peer sent signs alone, times one size for each layer (1-bit compression).

Notation as in `analytic.leak`. The sum of the peers' layers is `Z = sum_c s_c sign(G_c)`, and each peer has a size
`s_c` of its own, so the entries of Z have few values, from which the sizes follow, and with them the signs of every
single peer: the aggregation is undone. Then, peer by peer:

1. A hidden unit that is active for none of a peer's images has no sign in its row of the first layer.
2. In the last layer, the row of a held class is negative at the units that are active for its image, positive at the
   others that are active for any image: gates, and whose image it is.
3. `sign(Delta_c^T f)`, of one feature f of the peer's images, are as many bits as there are units for as many unknowns
   as it has images: its direction is the least-squares solution (Plan and Vershynin 2013). Its size shows in no sign:
   it is taken from typical features, then from the features of the images found so far, but for the mean size of all
   entries of a peer, which is the `s_c` that it sends.
"""

import math
from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from attack_modules.analytic.defended_head import (
    DefendedFeatures,
    DefendedReading,
    Expected,
    HeadRound,
    UnreadableDefense,
)
from attack_modules.analytic.leak_defended import TYPICAL
from fl_lightning.defenses import Defense, Sign
from fl_lightning.loss import logit_errors

MOST_PEERS = 5
"""Number of peers up to which sizes are searched: sums of more come too close to each other."""
FINE = 0.06
"""Share of the entries, those of the smallest weights, that the models' rounding leaves fine enough to tell sizes."""
WIDTH = 2.5
"""Width of a histogram's bin over the rounding of these weights."""
LEAST_COUNT = 2e-4
"""Share of the entries from which they are a level."""
AMBIGUOUS = 0.2
"""Share of the sums of signs that coincide from which the peers' signs do not follow from them."""
ACTIVE = 0.3
"""Share of signs in a unit's row from which it is active for an image of the peer. Measured: up to 0.3 where it is not,
0.5 and more where it is."""
ROUNDING = math.pi / 2 - 1
"""Variance of what signs of Gaussian entries leave of these, over the entries' own (Plan and Vershynin 2013)."""
OF_TYPICAL = 0.24
"""Error of the features' sizes where they are those of typical images, relative to the features'."""
SLOWNESS = 0.19
"""Power of the number of readings by which this error falls. Measured on seed 1: 0.14, 0.13, 0.12 and 0.11 after 12,
24, 40 and 99 readings."""
HARM = 2.1
"""See `DefendedReading.harm`: wrong sizes are repeated by the images. Known images came back as badly as the peers' at
1.2, 1.9 and 1.8 times the error, of three seeds."""
USUAL = 0.25
"""Mean square of a peer's features in a column, over that of all, at which these count half: signs show each column up
to the same relative error, so that errors of large features are large. Measured on seed 0: 0.9 dB more; at 0.04 0.1."""


class SignedUpdate(DefendedReading):
    """Reads updates of which every peer sent the signs, times a size of its own."""

    resolves = 99  # images follow the sizes that they were made from, so these change little at a time
    harm = HARM
    shows_rank = False
    single_step = True

    def __init__(self) -> None:
        self._found: tuple[HeadRound, Tensor, Tensor, Tensor, Tensor, float] | None = None  # it is read again and again

    @classmethod
    def against(cls, defenses: Sequence[Defense]) -> "SignedUpdate | None":
        return cls() if any(isinstance(one, Sign) and one.scale is None for one in defenses) else None

    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        (seen,) = rounds
        if self._found is None or self._found[0] is not seen:
            self._found = (seen, *directions_of_signs(seen))
        _, gated, directions, peers, sizes, residual = self._found
        positive = expected.features.min() >= 0
        features, columns = torch.empty_like(directions), torch.empty_like(directions)
        error = directions.new_empty(len(peers))
        for peer in peers.unique():
            own, delta = directions[peers == peer], gated[peers == peer]
            own = own.clamp_min(0) if positive else own
            size = own.square().sum(0).clamp_min(torch.finfo(own.dtype).tiny)
            wanted = expected.features[peers == peer].to(own)
            if expected.of_images:
                along = ((own * wanted).sum(0) / size).clamp_min(0)
            else:
                along = (wanted.square().sum(0) / size).sqrt() / TYPICAL
            entries = delta.T @ (found := along * own)
            scale = sizes[peer] / entries.abs().mean()
            features[peers == peer], columns[peers == peer] = scale * found, (scale * found).square().mean(0)
            variance = ROUNDING * entries.square().sum() / (entries != 0).any(1).sum()
            scatter = torch.linalg.inv(delta @ delta.T).diagonal()
            error[peers == peer] = (scatter * variance / found.square().sum(1)).sqrt()
        usual = USUAL * features.square().mean()
        return DefendedFeatures(
            features=features,
            gated=gated,
            uncertainty=(error.square() + _of_sizes(expected, error).square()).sqrt(),
            peers=peers,
            residual=residual,
            weights=usual / (usual + columns),
        )


def _of_sizes(expected: Expected, of_directions: Tensor) -> Tensor:
    """(N,) error of the features' sizes, which no quantity shows: by how often they were read, which follows from it.

    Args:
        expected: of the features; its error is that of the reading before.
        of_directions: (N,) error of the features' directions.
    """
    if not expected.of_images:
        return torch.full_like(of_directions, OF_TYPICAL)
    before = (expected.error.to(of_directions).square() - of_directions.square()).clamp_min(0).sqrt() / OF_TYPICAL
    readings = before.clamp(torch.finfo(before.dtype).eps, 1) ** (-1 / SLOWNESS)
    return OF_TYPICAL * (readings + 1) ** -SLOWNESS


def directions_of_signs(seen: HeadRound) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """(N, H) gated errors, (N, D) features, of right columns up to their size, (N,) peers, (P,) sizes, the residual.

    The sizes are those of the peers' entries. The residual is the relative Frobenius norm of what the features'
    own signs leave of the update, which does not depend on the sizes of columns.
    """
    last = seen.last
    sizes = sizes_of_levels(seen.update, seen.weight, last.scale)
    signs = signs_of_peers(seen.update, sizes)
    active = ((signs != 0).double().mean(2) > ACTIVE).double()  # (P, H)
    rows = last.gradient[last.labels, : active.shape[1]]
    share = rows.abs().quantile(0.99) * sizes / sizes.sum()  # sizes of the last layer
    others = (share[:, None] * active).sum(0) - share[:, None] * active  # (P, H)
    own = rows[:, None] - others  # (N, P, H), if an image is of this peer
    gates = (own < -share[:, None] / 2).double() * active
    errors = logit_errors(last.probabilities.expand_as(last.targets), last.targets) @ last.weight
    gated = gates * errors[:, None, : active.shape[1]]
    spaces = torch.stack([leading(peer.float(), math.ceil(len(rows) / len(sizes))) for peer in signs]).double()
    inside = torch.einsum("nph,phk->npk", gated, spaces).norm(dim=2)
    peers = (inside / gated.norm(dim=2).clamp_min(torch.finfo(inside.dtype).tiny)).argmax(1)
    gated = gated[torch.arange(len(rows)), peers]
    features, left = gated.new_empty(len(gated), seen.update.shape[1]), seen.update.clone()
    for peer in peers.unique():
        own = gated[peers == peer].T
        features[peers == peer] = torch.linalg.pinv(own) @ signs[peer].double()
        left -= (sizes[peer] * (own @ features[peers == peer]).sign()).to(left)
    return gated, features, peers, sizes, (left.norm() / seen.update.norm()).item()


def leading(rows: Tensor, count: int) -> Tensor:
    """(H, count) leading directions of the column space of (H, D)."""
    return torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -count:]


def sizes_of_levels(update: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """(P,) falling sizes of the peers' entries, from the values that sums of their signs have.

    The largest value is the sum of all sizes. Where a single peer's entry is 0, or negative, it is less by once or
    twice its size; the sizes are those of such differences that sum to the largest value, as many as possible.

    Args:
        update: (H, D) sum of the peers' layers.
        weight: (H, D) of the layer, in float32, from the rounding of which the update is off.
        scale: by which the update was multiplied since.

    Raises:
        UnreadableDefense: no sizes explain the values, or they leave open which peer sent what, as equal ones do.
    """
    limit = weight.abs().flatten().kthvalue(max(int(FINE * weight.numel()), 1)).values
    values = update[weight.abs() <= limit].double().abs()
    width = WIDTH * torch.finfo(weight.dtype).eps * limit.item() * scale
    levels, counts = levels_of(values, width)

    def seen(size: Tensor) -> bool:
        return bool((levels - size.abs()).abs().min() < 1.5 * width)

    top = levels[-1]
    steps = [(size, count) for size, count in zip(top - levels, counts, strict=True) if size > 2 * width]
    steps = [(size.item(), int(count)) for size, count in steps if seen(top - 2 * size)]
    for number in range(min(MOST_PEERS, len(steps)), 0, -1):
        fitting = [
            chosen
            for chosen in combinations(steps, number)
            if abs(sum(size for size, _ in chosen) - top.item()) < 3 * width
        ]
        if fitting:
            best = max(fitting, key=lambda chosen: min(count for _, count in chosen))
            sizes = torch.tensor([size for size, _ in best], dtype=values.dtype)
            if (sums_of_signs(sizes)[1].diff() < width).double().mean() < AMBIGUOUS:
                return sizes
            break
    raise UnreadableDefense(
        f"The peers are said to send signs, but the {len(levels)} sizes of the update's entries are not sums of up to "
        f"{MOST_PEERS} different ones."
    )


def levels_of(values: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Ascending values (L,) that many entries have, and their numbers (L,); `width` is that of a histogram's bin."""
    bins = (values / width).round().long()
    counts = bins.bincount(minlength=int(bins.max()) + 2)
    sums = torch.zeros(len(counts), dtype=values.dtype).index_add_(0, bins, values)
    padded = torch.nn.functional.pad(counts, (1, 1))
    before, after = padded[:-2], padded[2:]
    peaks = ((counts >= before) & (counts > after) & (counts >= LEAST_COUNT * len(values))).nonzero().flatten()
    around = torch.nn.functional.pad(sums, (1, 1))
    number = (before + counts + after)[peaks]
    return (around[peaks] + around[peaks + 1] + around[peaks + 2]) / number, number


def signs_of_peers(update: Tensor, sizes: Tensor) -> Tensor:
    """(P, H, D) int8: the signs whose sum, times the sizes, is nearest to each entry."""
    every, levels = sums_of_signs(sizes)
    nearest = torch.bucketize(update.to(sizes).flatten(), (levels[1:] + levels[:-1]) / 2)
    return every[nearest].T.reshape(len(sizes), *update.shape)


def sums_of_signs(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(3^P, P) int8: all signs that peers of such sizes (P,) can send for an entry; and (3^P,) their ascending sums."""
    every = torch.tensor(list(product((-1, 0, 1), repeat=len(sizes))), dtype=torch.int8)
    sums, order = (every.to(sizes) @ sizes).sort()
    return every[order], sums
