"""Who trained together, and how large features of known directions are, from the errors that each image shows.

The first layer's update is `G1 = Delta^T F`, so the directions of all features `F` give each image's `Delta`, up to the
size of its features: its back-propagated error at each hidden unit, times the share of local steps in which that is
active. During these steps the images of a peer move each other's activations, by which some units switch, and each
other's predictions. So peers are those whose simulated training explains every image's `Delta`, which are many more
equations than the last layer's update, a sum over all images. The size of an image's features follows from that of its
`Delta`, given its predictions in the simulated training.

Images are moved from peer to peer, to a peer of their own, and exchanged, and peers are joined, as long as more is
explained; only peers that change are simulated.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress
from torch import Tensor

from attack_modules.analytic.drifting_peers import coupling_of
from attack_modules.analytic.head_training import simulate

ROUNDS = 4
"""Most of the rounds of peers -> sizes; peers rarely change in the third."""
SIZINGS = 12
"""Simulations in which sizes follow from given peers."""
SWEEPS = 10
"""Most of the sweeps of moves, exchanges and unions."""
EXCHANGED = 16
"""Images that are exchanged with all others, those explained worst."""
LEAST_GAIN = 1e-6
"""Of what is left unexplained of an image, by which a change pays."""
SIZE_RANGE = 2.0
"""Most by which a size differs from its first estimate. Measured: 1.4 for radiographs, where predictions move from
0.5 to 0.36; an image that fits no peer would vanish or grow without a limit."""
LEFT_TO_ERROR = 0.5
"""Error of an image's features over what is left unexplained of the errors that it shows, or that the median image does
if that is more. Measured: 0.1 to 0.6 where all images were found, 0.3 to 1.8 where one was missing."""


@dataclass(frozen=True)
class ShownErrors:
    """What the first layer shows of N images of which the directions of the features are known.

    Attributes:
        shown: (N, H) gated errors, mean over the steps, times the size of the image's features.
        gram: (N, N) inner products of the directions.
        start: (N, H) pre-activations of the directions before the round.
        weight: (C, H) of the last layer before the round, (C, H + 1) with a bias.
        targets: (N, C) of the loss.
        rate: of a step.
        steps: of each peer.
    """

    shown: Tensor
    gram: Tensor
    start: Tensor
    weight: Tensor
    targets: Tensor
    rate: float
    steps: int

    def unexplained(self, peers: Tensor, sizes: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Of the images `which` (n,), whose peers hold no others: what is unexplained, and sizes.

        Args:
            peers: (n,) long.
            sizes: (N,) of the features.
            which: (n,) long.

        Returns:
            (n,) share of the squared errors shown, and (n,) sizes with which most is explained.
        """
        size, shown = sizes[which], self.shown[which]
        gram = self.gram[which[:, None], which] * size[:, None] * size
        start = self.start[which] * size[:, None]
        targets = self.targets[which]
        path = simulate(gram, start, [self.weight], targets, coupling_of(peers), self.rate, self.steps)[0]
        gated = (path.errors * (path.preactivations > 0)).mean(0)
        square = gated.square().sum(1).clamp_min(torch.finfo(gated.dtype).tiny)
        fitted = ((gated * shown).sum(1) / square).clamp_min(0)
        left = (shown - fitted[:, None] * gated).square().sum(1) / shown.square().sum(1)
        return left.nan_to_num(1.0), fitted.nan_to_num(0.0)  # simulated training can diverge


@dataclass(frozen=True)
class TrainedTogether:
    """Peers of N images, and what follows from them.

    Attributes:
        peers: (N,) long, from 0.
        sizes: (N,) of the features.
        left: (N,) relative norm of what the peers' simulated training leaves of the errors that each image shows.
    """

    peers: Tensor
    sizes: Tensor
    left: Tensor

    @property
    def uncertainty(self) -> Tensor:
        """(N,) expected relative error of the features."""
        return LEFT_TO_ERROR * self.left.clamp_min(self.left.median())


def trained_together(images: ShownErrors, sizes: Tensor) -> TrainedTogether:
    """Group images by peer, without being told how many peers there are, or how many images each has.

    Args:
        images: of which the directions are known.
        sizes: (N,) first estimate of the sizes of their features.
    """
    everyone, first = torch.arange(len(sizes)), sizes
    best: TrainedTogether | None = None
    with Progress(disable=rank_zero_only.rank > 0) as progress:
        task = progress.add_task("Who trained together", total=ROUNDS)
        for _ in range(ROUNDS):
            starts = [everyone] if best is None else [everyone, best.peers]
            found = [_sized(images, _moved(images, start, sizes), sizes, first) for start in starts]
            new = min(found, key=lambda tried: tried.left.norm().item())
            progress.advance(task)
            if best is not None and new.left.norm() >= best.left.norm():
                break
            settled = best is not None and torch.equal(new.peers, best.peers)
            best, sizes = new, new.sizes
            if settled:
                break
        progress.update(task, completed=ROUNDS)
    return best


def _sized(images: ShownErrors, peers: Tensor, sizes: Tensor, estimate: Tensor) -> TrainedTogether:
    """Given peers (N,), with the sizes (N,) with which they explain most; `estimate` (N,) is the first one."""
    everyone = torch.arange(len(peers))
    for _ in range(SIZINGS):
        fitted = images.unexplained(peers, sizes, everyone)[1]
        sizes = fitted.clamp(estimate / SIZE_RANGE, estimate * SIZE_RANGE)
    first = (peers[:, None] == peers).long().argmax(1)  # numbers the peers in the order of their first images
    peers = first.unique(return_inverse=True)[1]
    return TrainedTogether(peers, sizes, images.unexplained(peers, sizes, everyone)[0].sqrt())


def _moved(images: ShownErrors, peers: Tensor, sizes: Tensor) -> Tensor:
    """(N,) peers, of which none has more to gain by a single change of those (N,) to begin with."""
    count = len(peers)
    left = images.unexplained(peers, sizes, torch.arange(count))[0]

    def take_best(changes: list[Tensor]) -> None:
        nonlocal peers, left
        best = peers, left
        for tried in changes:
            changed = tried != peers
            touched = torch.cat([tried[changed], peers[changed]])
            where = (torch.isin(peers, touched) | torch.isin(tried, touched)).nonzero()[:, 0]
            if len(where):
                new = left.index_put((where,), images.unexplained(tried[where], sizes, where)[0])
                if new.sum() < best[1].sum() - LEAST_GAIN:
                    best = tried, new
        peers, left = best

    for _ in range(SWEEPS):
        before = left.sum()
        worst = left.argsort(descending=True).tolist()
        for image in worst:
            alone = int((torch.arange(count)[:, None] != peers).all(1).long().argmax())
            others = {*peers.tolist(), alone}
            take_best([_changed(peers, [image], [other]) for other in sorted(others)])
        for place, image in enumerate(worst[:EXCHANGED]):
            for other in worst[place + 1 :]:
                take_best([_changed(peers, [image, other], peers[[other, image]].tolist())])
        names = peers.unique().tolist()
        take_best([torch.where(peers == other, one, peers) for one, other in combinations(names, 2)])
        if left.sum() > before - LEAST_GAIN:
            break
    return peers


def _changed(peers: Tensor, images: list[int], to: list[int]) -> Tensor:
    """The peers (N,), of some images others."""
    return peers.index_put((torch.tensor(images),), torch.tensor(to))
