"""Features where each peer sent only the largest entries of its update (top-k sparsification, gradient pruning).

Notation as in `analytic.leak`. Peer c sends an entry of `G_c = Delta_c^T F_c` if its size is among its largest, so the
observed sum is `Z = sum_c M_c G_c`, with masks `M_c` that are known as soon as the features are, nearly: what was sent
was large. So masks and features are estimated alternately, each column of Z (one feature of all images) by least
squares over the entries that the masks say were sent. Held classes' rows of the last layer are the largest of all and
complete even where 99 % are pruned, so labels, activations and gates are read as if nothing had been pruned.

Which peer an image belongs to shows in the masks: two images of one peer bring an entry over the threshold together,
or cancel; images of two peers do not. Then images join another peer if that explains more.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from attack_modules.analytic.defended_head import DefendedFeatures, DefendedReading, Expected, HeadRound
from attack_modules.analytic.head_training import group_peers
from fl_lightning.defenses import Defense, TopK

RIDGE = 0.1
"""Weight of what is expected of the features beside the equations, as a share of these were nothing pruned."""
CLOSED = 0.02
"""Activation, as a share of the rms, up to which a unit counts as inactive: pruned rows of other classes shift it."""
SENT = 0.01
"""Size of an entry, as a share of the rms, from which on somebody sent it: what is left of the attacker's own entries
is not exactly 0."""
MUCH = 0.4
"""Residual from which too much is unexplained. Measured: 0.19 to 0.21 where 10 % are sent, 0.33 where 1 %; 0.45 and
0.57 after training and at a large rate, where the plain attack makes as much of the update, or 3 dB more."""
HARM = 2.2
"""See `DefendedReading.harm`: small features go missing together. Measured where 1 % are sent, on three seeds; at 1.9,
one of 48 images, of 16 dB, was likely."""
COLUMNS = 256
"""Number of features from which the peers and the share of entries that is sent are estimated."""
FEWER = 64
"""Number of features from which it is seen whether an image belongs to another peer."""
MOST_SENT = 1 / 16
"""Share of the features, those with most entries that were sent, from which these are."""
TRIES = 2
"""How often masks and features are found alternately for each of these assignments."""
CHUNK = 512
"""Columns that are solved at once."""


class PrunedUpdate(DefendedReading):
    """Reads updates of which every peer sent only the largest entries; how many is estimated."""

    resolves = 12
    harm = HARM
    most_unexplained = MUCH

    def __init__(self) -> None:
        self._found: tuple[HeadRound, Tensor] | None = None  # peers do not change as it is read again

    @classmethod
    def against(cls, defenses: Sequence[Defense]) -> "PrunedUpdate | None":
        return cls() if any(isinstance(defense, TopK) for defense in defenses) else None

    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        update = torch.cat([seen.update for seen in rounds])
        errors = torch.cat([seen.errors for seen in rounds], 1)
        gated = (active(torch.cat([seen.activations for seen in rounds], 1)) * errors).to(update)
        sent, peers = update.abs() > SENT * update.square().mean().sqrt(), torch.zeros(len(gated), dtype=torch.long)
        prior, off = expected.features.to(update), expected.error.to(update)
        features = prior
        if not expected.of_images:
            features, _, _ = solve_columns(update, gated, sent[None], peers, prior, off)
        peers = self._peers_of(rounds, update, gated, sent, features, prior, off)
        features, error, shown = solve_columns(update, gated, masks(sent, gated, features, peers), peers, prior, off)
        every = peer_updates(gated, features, peers) * masks(sent, gated, features, peers)
        return DefendedFeatures(
            features=features.double(),
            gated=gated.double(),
            uncertainty=error.double(),
            peers=peers,
            residual=((update - every.sum(0)).norm() / update.norm()).item(),
            weights=shown.double(),
        )

    def _peers_of(
        self,
        rounds: Sequence[HeadRound],
        update: Tensor,
        gated: Tensor,
        sent: Tensor,
        features: Tensor,
        expected: Tensor,
        off: Tensor,
    ) -> Tensor:
        """(N,) the peers, which are found when rounds are read first."""
        if self._found is None or self._found[0] is not rounds[0]:
            peers = peers_of_masks(sent, gated, features)
            most = sent.sum(0).topk(max(int(MOST_SENT * sent.shape[1]), min(FEWER, sent.shape[1]))).indices
            some = most[:: max(len(most) // FEWER, 1)]
            peers = regrouped(update[:, some], gated, features[:, some], peers, expected[:, some], off)
            self._found = rounds[0], peers
        return self._found[1]


def active(activations: Tensor) -> Tensor:
    """(N, K) bool: whether units are active, from activations (N, K)."""
    return activations > CLOSED * activations.square().mean(1, keepdim=True).sqrt()


def solve_columns(
    update: Tensor, gated: Tensor, sent: Tensor, peers: Tensor, expected: Tensor, off: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Features by least squares over the entries that were sent, column by column.

    Args:
        update: (K, D).
        gated: (N, K) back-propagated errors, gates included.
        sent: (P, K, D) bool, which entries each peer sent.
        peers: (N,) long, below P.
        expected: (N, D) features to which the equations are regularised.
        off: (N,) error of these, relative to their size.

    Returns:
        (N, D), not negative unless the expected are; (N,) their expected relative error, what the residual and what
        the expected features leave of theirs; and (N, D) the share in [0, 1] of each that is not as expected.
    """
    ridge = RIDGE * gated.square().sum(1)
    solved, shares, variance, kept = [], [], torch.zeros_like(off), torch.zeros_like(off)
    for columns in torch.arange(update.shape[1]).split(CHUNK):
        mask = sent[:, :, columns].permute(2, 1, 0)[..., peers]  # (chunk, K, N)
        design = mask * gated.T
        normal = design.mT @ design + ridge.diag()
        right = (design.mT @ update[:, columns].T[..., None])[..., 0] + ridge * expected[:, columns].T
        inverse = torch.linalg.inv(normal)
        solved.append((inverse @ right[..., None])[..., 0])
        missing = (update[:, columns].T - (design @ solved[-1][..., None])[..., 0]).square().sum(1)
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        shares.append(1 - diagonal * ridge)
        left = mask.any(2).sum(1) - shares[-1].sum(1)  # degrees of freedom
        variance += ((missing / left.clamp_min(1))[:, None] * diagonal).sum(0)
        kept += ((diagonal * ridge).square() * expected[:, columns].T.square()).sum(0)
    features = torch.cat(solved).T.clamp_min(min(expected.min().item(), 0.0))
    error = ((variance + kept * off.square()) / features.square().sum(1)).sqrt()
    return features, error, torch.cat(shares).T.clamp(0, 1)


def peer_updates(gated: Tensor, features: Tensor, peers: Tensor) -> Tensor:
    """(P, K, D) update of each peer before anything is pruned."""
    return torch.stack([gated[peers == peer].T @ features[peers == peer] for peer in peers.unique()])


def masks(sent: Tensor, gated: Tensor, features: Tensor, peers: Tensor) -> Tensor:
    """(P, K, D) bool: which entries each peer sent.

    Each sends the same share of its entries, which is chosen such that as many entries of the sum are not 0 as were
    observed. Where an entry is not 0 but below the threshold of every peer, the peer that is nearest to its own sent.
    """
    sizes = peer_updates(gated, features, peers).abs()
    sample = sizes[:, :, :: max(sizes.shape[2] // COLUMNS, 1)].flatten(1)
    ordered, low, high = sample.sort(1).values, 0.0, 1.0
    for _ in range(20):
        keep = (low + high) / 2
        thresholds = ordered[:, min(int((1 - keep) * ordered.shape[1]), ordered.shape[1] - 1)]
        seen = (sample >= thresholds[:, None]).any(0).to(sample).mean()
        low, high = (low, keep) if seen > sent.to(sample).mean() else (keep, high)
    ratio = sizes / thresholds.clamp_min(torch.finfo(sizes.dtype).tiny)[:, None, None]
    return ((ratio >= 1) | (ratio == ratio.amax(0))) & sent


def peers_of_masks(sent: Tensor, gated: Tensor, features: Tensor) -> Tensor:
    """(N,) peer of each image, from which entries were sent.

    Whether an entry was sent is regressed on the products of what each two images bring to it, among entries of
    about the size from which on they are sent. Only products of images of one peer matter.
    """
    columns = torch.arange(0, features.shape[1], max(features.shape[1] // COLUMNS, 1))
    parts = (gated[:, :, None] * features[:, None, columns]).flatten(1)  # (N, entries)
    size = parts.square().sum(0)
    seen = sent[:, columns].flatten().to(parts)
    order = size.argsort()
    rate = seen[order].cumsum(0)
    window = max(len(order) // 100, 1)
    local = (rate[window:] - rate[:-window]) / window
    near = order[window // 2 : window // 2 + len(local)][(local > 0.1) & (local < 0.9)]
    near = near[size[near] > 0]
    parts, seen, size = parts[:, near], seen[near], size[near]
    first, second = torch.triu_indices(len(parts), len(parts), 0)
    products = torch.cat([parts[first] * parts[second] / size, size.log()[None], torch.ones_like(size)[None]])
    gram = products @ products.T
    fitted = torch.linalg.lstsq(gram.double(), (products @ seen).double(), driver="gelsd").solution[: len(first)]
    influence = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    influence[first, second] = influence[second, first] = fitted
    influence.fill_diagonal_(0.0)
    influence = influence.clamp_min(0)
    return group_peers(influence + influence.amax(1).diag())


def regrouped(update: Tensor, gated: Tensor, features: Tensor, peers: Tensor, expected: Tensor, off: Tensor) -> Tensor:
    """(N,) the peers, after images went to other ones, image by image, as long as that explains more of the update.

    The features of all images are solved for at each try: those that were made for other peers would speak for these.

    Args:
        update: (K, d) some of its columns.
        gated: (N, K) back-propagated errors, gates included.
        features: (N, d) in these columns.
        peers: (N,) long, to begin with.
        expected: (N, d) features to which the equations are regularised.
        off: (N,) error of these, relative to their size.
    """
    sent = update.abs() > SENT * update.square().mean().sqrt()

    def unexplained(peers: Tensor) -> float:
        found = features
        for _ in range(TRIES):
            found, _, _ = solve_columns(update, gated, masks(sent, gated, found, peers), peers, expected, off)
        seen = peer_updates(gated, found, peers) * masks(sent, gated, found, peers)
        return (update - seen.sum(0)).square().sum().item()

    left, since = unexplained(peers), 0
    for image in itertools.cycle(range(len(peers))):
        moves = [peers.clone() for peer in peers.unique() if peer != peers[image]]
        others = [peer for peer in peers.unique() if peer != peers[image]]
        for move, peer in zip(moves, others, strict=True):
            move[image] = peer
        moves = [move.unique(return_inverse=True)[1] for move in moves]
        lefts = [unexplained(move) for move in moves]
        since += 1
        if lefts and min(lefts) < left:
            left, peers, since = min(lefts), moves[lefts.index(min(lefts))], 0
        if since == len(peers):
            return peers
