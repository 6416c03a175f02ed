"""Features where each peer rounds its update at random to multiples of its buckets' norms (QSGD).

Notation as in `analytic.leak`. Peer c sends `k s` in place of an entry g of its layer `G_c = Delta_c^T F_c`: s is the
norm of the entry's bucket over the number of levels, and k one of the two whole numbers next to `g / s`, such that its
mean is right. Norms are real numbers, different for each peer and bucket, and they are sent exactly. That gives away
three things:

1. *Who sent what.* The sum of the peers' entries has few values in a bucket, the most frequent of which are the peers'
   sizes s. Every other value is a sum of whole multiples of them, so the aggregation is undone, bucket by bucket.
2. *Gates.* The norm of row h in the columns of bucket b is `delta_h^T K_b delta_h`, with `K_b` the inner products of a
   peer's features in these columns: so few unknowns for all rows that they, and the gates in `delta_h`, are exact.
3. *Features*, by maximum likelihood. The rounding of an entry has variance `|g| (s - |g|)` (below one level), so that
   entries that are small, or near a multiple, tell far more than their share in a sum of squares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.adam_step import rounding
from attack_modules.analytic.defended_head import (
    DefendedFeatures,
    DefendedReading,
    Expected,
    HeadRound,
    UnreadableDefense,
)
from attack_modules.analytic.noisy_gates import NoisyFeatures, NoisyGates, noisy_gates
from fl_lightning.defenses import QSGD, Defense

MOST_PEERS = 5
"""Number of peers up to which sizes are searched: sums of more come too close to each other."""
FINE = 3.0
"""Distance over the rounding of the models up to which two values are the same."""
LADDER = (1, 2, 4)
"""Largest multiples that are tried, one after the other: the smallest that explain a value are the likeliest."""
MOST_SUMS = 10_000
"""Number of sums of multiples up to which they are all looked at."""
UNEXPLAINED = 0.02
"""Share of the entries that sums of the peers' sizes may leave unexplained. Measured: up to 0.008 with the right number
of peers, 0.04 and more with a smaller one."""
CHUNK = 1024
"""Buckets that are decoded at once."""
SAMPLE = 1024
"""Buckets from which the number of peers is found."""
MATCHES = (0.5, 0.3, 0.2, 0.1)
"""Standard deviation of the logarithm of a norm that is foretold, in each alternation of whose levels are whose, gates
and features."""
FAR = 8.0
"""Log odds against a norm that is far from the one that is foretold, at most."""
LEAST_NORM = 0.01
"""Norm, as a share of the rms, below which a bucket counts as empty."""
OUTLIER = 0.2
"""Relative error of a norm from which it is another peer's."""
SWEEPS = 6
"""Alternations of gates and inner products, at most."""
MISFIT = 0.02
"""Relative error of the norms from which levels were misread. Measured on seed 0: 0.09 of 16 levels and 0.12 of
one, which were misread; less than this of 4, which were not."""
ITERATIONS = 8
"""Of the likelihood's weights, in the last alternation."""
FEW = 2
"""The same in those before."""
LEAST_VARIANCE = 1e-3
"""Variance of a rounding error in units of s^2, at least."""
RIDGE = 1e-4
"""Share of the equations' weight that is added to them."""
TINY = torch.finfo(torch.float32).tiny


class BucketNorms(DefendedReading):
    """Reads updates of which every peer rounded the entries to multiples of its buckets' norms.

    Args:
        levels: of QSGD.
        bucket: consecutive entries that share a norm.
    """

    def __init__(self, levels: int, bucket: int) -> None:
        self.levels = levels
        self.bucket = bucket

    @classmethod
    def against(cls, defenses: Sequence[Defense]) -> "BucketNorms | None":
        return next((cls(one.levels, one.bucket) for one in defenses if isinstance(one, QSGD)), None)

    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        try:
            return self._undone(rounds)
        except UnreadableDefense as error:
            why = str(error)
        except torch.linalg.LinAlgError:  # as where sums of many multiples are misread, of 16 levels
            why = "What the peers' sizes are taken to be gives equations that cannot be solved."
        rank_zero_warn(f"{why} It is read as noise.")
        return NoisyGates().solve(rounds, expected)

    def _undone(self, rounds: Sequence[HeadRound]) -> DefendedFeatures:
        """Features, of updates of which it shows who sent what."""
        update = torch.cat([seen.update for seen in rounds])
        noise = torch.cat([rounding(seen.weight.abs(), 1) * seen.last.scale for seen in rounds]).to(update)
        width = update.shape[1] // self.bucket * self.bucket
        if update.shape[1] - width > 1:  # a bias is one more column
            raise UnreadableDefense(
                f"The peers are said to round by QSGD in buckets of {self.bucket} entries, of which a row of "
                f"{update.shape[1]} is no multiple, so that norms of buckets are none of single rows."
            )
        sent = sent_levels(*(part[:, :width].reshape(-1, self.bucket) for part in (update, noise)), self.levels)
        found = solve_levels(sent, self.levels, noisy_gates(rounds))
        ones = torch.linalg.lstsq(found.gated.T, update[:, width:].to(found.gated)).solution  # of a bias
        left = found.gated.T @ found.features - update[:, :width]
        return DefendedFeatures(
            features=torch.cat([found.features, ones], 1).double(),
            gated=found.gated.double(),
            uncertainty=found.uncertainty.double(),
            peers=found.peers,
            residual=(left.norm() / update.norm()).item(),
            noise=left.square().mean().sqrt().item(),
        )


@dataclass(frozen=True)
class SentLevels:
    """What the peers sent of a layer, in B buckets of n entries; P peers, in each bucket in an order of its own.

    Attributes:
        sizes: (B, P) of one level; 0 where a peer sent nothing.
        counts: (B, n, P) int8, the multiples.
        explained: (B, n) bool, entries that are such a sum.
    """

    sizes: Tensor
    counts: Tensor
    explained: Tensor

    def of(self, place: int) -> Tensor:
        """(B, n) what one of the peers sent."""
        return self.counts[..., place] * self.sizes[:, place, None]


def sent_levels(values: Tensor, noise: Tensor, levels: int) -> SentLevels:
    """Undo the sum of the peers' entries.

    Args:
        values: (B, n) sums.
        noise: (B, n) standard deviation of what the models' rounding adds.
        levels: of QSGD, whose multiples have a sum of squares of at least about the levels' square.

    Raises:
        UnreadableDefense: no sums of multiples of up to `MOST_PEERS` sizes explain the values.
    """
    coarse = noise.amax(1)
    sample = torch.arange(0, len(values), max(len(values) // SAMPLE, 1))
    left = sizes_of_buckets(values[sample], coarse[sample], MOST_PEERS)[1]
    used = (values[sample].abs() > FINE * noise[sample]).sum()
    peers = next((m + 1 for m in range(MOST_PEERS) if left[:, m].sum() < UNEXPLAINED * used), None)
    if peers is None:
        raise UnreadableDefense(
            f"The peers are said to round by QSGD, but {left[:, -1].sum() / used:.0%} of the update's entries are no "
            f"sums of multiples of up to {MOST_PEERS} sizes in a bucket."
        )
    parts = []
    for one, off, worst in zip(values.split(CHUNK), noise.split(CHUNK), coarse.split(CHUNK), strict=True):
        sizes, _ = sizes_of_buckets(one, worst, peers)
        counts, explained = multiples(one, sizes, off)
        sizes, counts = shortest(sizes, counts)
        # rounding adds up to n / 4 to the levels' square; what is far from it is no peer's, but some left over value
        energy = counts.float().square().sum(1)  # (b, P)
        none = (energy < levels**2 / 2) | (energy > 2 * levels**2 + counts.shape[1] / 2)
        explained &= ~((counts != 0) & none[:, None]).any(2)
        parts.append((torch.where(none, 0.0, sizes), counts * ~none[:, None], explained))
    return SentLevels(*(torch.cat(part) for part in zip(*parts, strict=True)))


def sizes_of_buckets(values: Tensor, noise: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(B, most) sizes, the most frequent value that the former ones leave first; (B, most) entries that are left then.

    Args:
        values: (B, n).
        noise: (B,) standard deviation.
        most: number of sizes.
    """
    ordered, same = values.abs().sort(1).values, FINE * noise[:, None]
    first = F.pad(ordered.diff(dim=1) > same, (1, 0), value=True)
    kind = first.cumsum(1) - 1
    counts = torch.zeros_like(ordered).scatter_add_(1, kind, torch.ones_like(ordered))
    kinds = torch.zeros_like(ordered).scatter_add_(1, kind, ordered) / counts.clamp_min(1)
    open_ = kinds > 2 * same
    largest = kinds.amax(1, keepdim=True).clamp_min(torch.finfo(kinds.dtype).tiny)
    sizes, left = kinds.new_zeros(len(values), 0), []
    for _ in range(most):
        # of equally frequent ones, the smallest
        often = torch.where(open_, counts - kinds / largest / 2, -1.0).argmax(1, keepdim=True)
        chosen = torch.where(open_.any(1, keepdim=True), kinds.gather(1, often), 0.0)
        sizes = torch.cat([sizes, chosen], 1)
        for largest_multiple in LADDER[:2]:
            open_ &= nearest_sum(kinds, sizes, largest_multiple)[0] > same
        left.append((counts * open_).sum(1))
    return sizes, torch.stack(left, 1)


def nearest_sum(values: Tensor, sizes: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """(B, n) distance of values to the nearest sum of multiples of sizes (B, P), and (B, n, P) int8 the multiples."""
    every = torch.cartesian_prod(*[torch.arange(-largest, largest + 1, dtype=torch.int8)] * sizes.shape[1])
    every = every.reshape(-1, sizes.shape[1])
    sums, order = (sizes @ every.to(sizes).T).sort(1)
    after = torch.searchsorted(sums, values).clamp_max(len(every) - 1)
    before = (after - 1).clamp_min(0)
    up, down = (sums.gather(1, after) - values).abs(), (values - sums.gather(1, before)).abs()
    return torch.minimum(up, down), every[order.gather(1, torch.where(up < down, after, before))]


def multiples(values: Tensor, sizes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, P) int8 multiples of sizes (B, P) whose sums are the values (B, n), and (B, n) whether there are any."""
    counts = torch.zeros(*values.shape, sizes.shape[1], dtype=torch.int8)
    explained = torch.zeros_like(values, dtype=torch.bool)
    for largest in LADDER:
        open_ = ~explained.all(1)
        if (2 * largest + 1) ** sizes.shape[1] > MOST_SUMS or not open_.any():
            break
        distance, found = nearest_sum(values[open_], sizes[open_], largest)
        new = (distance < 2 * FINE * noise[open_]) & ~explained[open_]
        counts[open_] = torch.where(new[..., None], found, counts[open_])
        explained[open_] |= new
    return counts, explained


def shortest(sizes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The same sums of other sizes, such that the multiples (B, n, P) are small.

    What is found first may be the sum or difference of two sizes. Then one of them is their difference or sum, with
    `s_i k_i + s_j k_j = (s_i - t s_j) k_i + s_j (k_j + t k_i)` and t = 1 or -1, where that makes multiples smaller.
    """
    sizes, counts = sizes.clone(), counts.clone()
    peers = range(sizes.shape[1])
    for _ in range(2 * len(peers)):
        changed = False
        for i, j, t in ((i, j, t) for i in peers for j in peers for t in (1, -1) if i != j):
            other = counts[..., j] + t * counts[..., i]
            better = other.abs().sum(1) < counts[..., j].abs().sum(1)
            if not better.any():
                continue
            changed = True
            counts[better, :, j] = other[better]
            difference = sizes[better, i] - t * sizes[better, j]
            sizes[better, i] = difference.abs()
            counts[better, :, i] = counts[better, :, i] * difference.sign().to(counts)[:, None]
        if not changed:
            break
    return sizes, counts


@dataclass(frozen=True)
class SolvedLevels:
    """What the peers' levels show; N images, K units.

    Attributes:
        features: (N, D).
        gated: (N, K) back-propagated errors, gates included.
        uncertainty: (N,) expected relative error of the features.
        peers: (N,) long.
    """

    features: Tensor
    gated: Tensor
    uncertainty: Tensor
    peers: Tensor


def solve_levels(sent: SentLevels, levels: int, start: NoisyFeatures) -> SolvedLevels:
    """Whose levels are whose, gates, and features, alternately.

    Args:
        sent: by P peers.
        levels: of QSGD.
        start: features and gates as if the rounding were noise.

    Raises:
        UnreadableDefense: the norms are not those of any gates, so that levels are not what they were taken for.
    """
    size, rows = sent.counts.shape[1], start.gates.shape[1]
    width = sent.counts.shape[0] // rows * size  # without a bias
    features, errors, gates = start.features[:, :width].float(), start.errors.float(), start.gates > 0.5
    peers = peers_of_levels(sent, features, (start.gates * start.errors).float())
    groups = [peers == peer for peer in peers.unique()]
    uncertainty, norms = torch.empty(len(features)), None
    explained = sent.explained.reshape(rows, -1)
    for reading, match in enumerate(MATCHES):
        iterations = ITERATIONS if reading == len(MATCHES) - 1 else FEW
        entries = torch.stack([(gates[own] * errors[own]).T @ features[own] for own in groups])
        entries = entries.reshape(len(groups), -1, size)
        norms = entries.norm(dim=2).T if norms is None else norms  # (B, P)
        place = whose(sent, levels, entries, norms, match)
        own_sizes, norms = sent.sizes.gather(1, place), torch.empty_like(norms)
        for peer, own in enumerate(groups):
            level = own_sizes[:, peer, None]
            counts = sent.counts.gather(2, place[:, None, peer, None].expand(-1, size, -1))[..., 0]
            found, shown = gates_of_norms((levels * level).reshape(rows, -1), errors[own], gates[own])
            gates[own], norms[:, peer] = found, shown.flatten()
            parts = ((counts * level).reshape(rows, -1), level.expand(-1, size).reshape(rows, -1), explained)
            features[own], variance = likeliest(*parts, found * errors[own], iterations)
            uncertainty[own] = (variance.sum(1) / features[own].square().sum(1)).sqrt()
    off = (norms - levels * own_sizes).abs() / (norms + levels * own_sizes).clamp_min(TINY)
    if (misfit := off[own_sizes > 0].median().item()) > MISFIT:
        raise UnreadableDefense(
            f"The peers are said to round by QSGD to {levels} levels, but the norms of their buckets are {misfit:.0%} "
            "off those of any images, so that sums of levels were misread."
        )
    return SolvedLevels(features, gates * errors, uncertainty, peers)


def peers_of_levels(sent: SentLevels, features: Tensor, gated: Tensor) -> Tensor:
    """(N,) peer of each image: images of one peer explain the same one of the multiples in a bucket.

    Args:
        sent: by P peers, in the buckets of K rows.
        features: (N, D), as far as they are known.
        gated: (N, K) back-propagated errors, gates included.

    Raises:
        UnreadableDefense: an image explains nothing.
    """
    if min(len(features), sent.sizes.shape[1]) == 1:
        return torch.zeros(len(features), dtype=torch.long)
    parts = features.unflatten(1, (-1, sent.counts.shape[1]))  # (N, D / n, n)
    gram = torch.einsum("nbe,mbe->bnm", parts, parts)
    gram = gram + 0.1 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(len(features)).to(gram)
    together = features.new_zeros(len(features), len(features))
    for column in range(parts.shape[1]):
        rows = (sent.sizes[column :: parts.shape[1]] > 0).any(1) & (gated != 0).any(0)
        buckets = torch.arange(column, len(sent.sizes), parts.shape[1])[rows]
        shown = torch.einsum("bep,ne->bpn", sent.counts[buckets].to(features), parts[:, column])
        shown = shown * sent.sizes[buckets][..., None]
        own = torch.linalg.solve(gram[column], shown.flatten(0, 1).T).T.unflatten(0, shown.shape[:2])
        delta = gated[:, rows].T  # (rows, N)
        share = own * delta[:, None] / delta.square().sum(1)[:, None, None]
        together += torch.einsum("bpn,bpm->nm", share, share)
    size = together.diagonal().sqrt()
    if not (size > 0).all():
        raise UnreadableDefense("The peers are said to round by QSGD, but no bucket shows whose levels are whose.")
    apart = (1 - together / size / size[:, None]).double().fill_diagonal_(0)
    groups = fcluster(linkage(squareform(apart.numpy(), checks=False), "average"), sent.sizes.shape[1], "maxclust")
    return torch.from_numpy(groups).unique(return_inverse=True)[1]


def whose(sent: SentLevels, levels: int, expected: Tensor, norms: Tensor, match: float) -> Tensor:
    """(B, P) long: the place, among the multiples of a bucket, of each peer's.

    Args:
        sent: by P peers.
        levels: of QSGD.
        expected: (P, B, n) what each peer's entries should be, as far as known.
        norms: (B, P) what their norms should be.
        match: standard deviation of the logarithm of these.
    """
    values = sent.counts.to(expected) * sent.sizes[:, None]
    along = torch.einsum("bep,cbe->bpc", values, expected).clamp_min(0)
    along = along / expected.norm(dim=2).T[:, None].clamp_min(TINY)
    spread = values.square().mean(1).clamp_min(TINY)
    least = LEAST_NORM * norms.square().mean().sqrt()
    off = ((levels * sent.sizes + least).log()[..., None] - (norms + least).log()[:, None]) / match
    score = along.square() / spread[..., None] / 2 - (off.square() / 2).clamp_max(FAR)  # (B, places, peers)
    orders = torch.tensor(list(permutations(range(sent.sizes.shape[1]), len(expected))))
    totals = sum(score[:, orders[:, peer], peer] for peer in range(len(expected)))
    return orders[totals.argmax(1)]


def gates_of_norms(norms: Tensor, errors: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """(n, K) bool gates of a peer's n images from the norms of its entries, and (K, B) these norms as they follow.

    Args:
        norms: (K, B) of the entries of row h in the columns of bucket b.
        errors: (n, K) with every gate open.
        gates: (n, K) bool, to begin with.
    """
    first, second = torch.triu_indices(len(errors), len(errors))
    twice = torch.where(first == second, 1.0, 2.0).to(norms)
    flips = torch.eye(len(errors), dtype=torch.bool)
    pairs = flips[first[first != second]] ^ flips[second[first != second]]
    flips = torch.cat([torch.zeros_like(flips[:1]), flips, pairs])

    def design(gates: Tensor) -> Tensor:
        delta = (gates * errors).T  # (K, n)
        return delta[:, first] * delta[:, second] * twice

    least = LEAST_NORM * norms.square().mean().sqrt()
    squared, usual = norms.square(), norms.square().mean()
    weight = 1 / (squared + usual)
    for _ in range(SWEEPS):
        equations = design(gates)
        for _ in range(3):
            inner = torch.einsum("hp,hb,hq->bpq", equations, weight, equations).double()
            inner = inner + 1e-6 * torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
            right = torch.einsum("hp,hb->bp", equations, weight * squared).double()
            gram = torch.linalg.solve(inner, right[..., None])[..., 0].to(norms)
            shown = (equations @ gram.T).clamp_min(0).sqrt()
            off = (shown - norms) / (norms + shown + least)
            weight = 1 / ((norms + shown).square() + usual) / (off.square() + off.square().median() + 1e-6)
        tried = gates ^ flips[..., None]  # (flips, n, K)
        wrong = torch.stack([_distance(design(one) @ gram.T, norms, least) for one in tried])
        best = wrong.argmin(0)
        new = tried[best, :, torch.arange(len(best))].T
        if torch.equal(new, gates):
            break
        gates = new
    return gates, shown


def _distance(squared: Tensor, norms: Tensor, least: Tensor) -> Tensor:
    """(K,) of norms, of which some may be of other peers."""
    shown = squared.clamp_min(0).sqrt()
    return ((shown - norms).abs() / (norms + shown + least)).clamp_max(OUTLIER).sum(1)


def likeliest(
    values: Tensor, sizes: Tensor, known: Tensor, gated: Tensor, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor]:
    """(n, D) features of a peer's images by maximum likelihood, and (n, D) their variance.

    The gradient of the log likelihood of `k` is that of a sum of squares with the variance of the rounding, which
    depends on the entry: the equations are solved again with the variances that the features then have. Where
    they leave more unexplained than the rounding, as after several local steps, it counts as well (White 1980).

    Args:
        values: (K, D) sent.
        sizes: (K, D) of one level.
        known: (K, D) whether an entry is.
        gated: (n, K) back-propagated errors, gates included.
        iterations: of the variances.
    """
    pairs, one = (gated[:, None] * gated).flatten(0, 1), torch.eye(len(gated)).to(gated)  # (n * n, K)
    use = (known & (sizes > 0)).to(values)
    variance = sizes.square() / 4
    for _ in range(iterations):
        weight = use / variance.clamp_min(TINY)
        normal = (pairs @ weight).T.unflatten(1, (len(gated), len(gated)))
        normal = normal + RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * one
        covariance = torch.linalg.inv(normal.double()).to(values)
        features = (covariance @ (gated @ (values * weight)).T[..., None])[..., 0].T.clamp_min(0)
        entries = gated.T @ features
        spread = (pairs.T @ covariance.flatten(1).T).clamp_min(0)
        level = ((entries.square() + spread).sqrt() / sizes.clamp_min(TINY)).frac()
        variance = sizes.square() * (level * (1 - level)).clamp_min(LEAST_VARIANCE)
    scatter = (pairs @ (weight * (values - entries)).square()).T.unflatten(1, (len(gated), len(gated)))
    robust = covariance @ scatter @ covariance
    return features, torch.maximum(covariance.diagonal(dim1=1, dim2=2), robust.diagonal(dim1=1, dim2=2)).T
