"""Who trained together, and how large features of known directions are, from the errors that each image shows.

The first layer's update is `G1 = Delta^T F`, so the directions of all features `F` give each image's `Delta`, up to the
size of its features: its back-propagated error at each hidden unit, times the share of local steps in which that is
active. During these steps the images of a peer move each other's activations, by which some units switch, and each
other's predictions. So peers are those whose simulated training explains every image's `Delta`, which are many more
equations than the last layer's update, a sum over all images. The size of an image's features follows from that of its
`Delta`, given its predictions in the simulated training.

Images are moved from peer to peer, to a peer of their own, and exchanged, and peers are joined, as long as more is
explained. What a group of images explains as one peer is simulated once, for several groups at a time.
"""

from collections.abc import Iterable
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
AT_ONCE = 96
"""Images of groups that are simulated at once, beside each other: the time of few images is that of the calls."""
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


Group = frozenset[int]
"""Images that train together."""


def _moved(images: ShownErrors, peers: Tensor, sizes: Tensor) -> Tensor:
    """(N,) peers, of which none has more to gain by a single change of those (N,) to begin with."""
    simulated = _Simulated(images, sizes)
    groups = [frozenset((peers == peer).nonzero()[:, 0].tolist()) for peer in peers.unique()]

    def take_best(changes: Iterable[tuple[tuple[Group, ...], tuple[Group, ...]]]) -> None:
        """Of groups and those that would stand in their place."""
        changes = [(old, tuple(filter(None, new))) for old, new in changes]
        simulated.add(group for change in changes for group in (*change[0], *change[1]))
        gains = [sum(map(simulated.total, old)) - sum(map(simulated.total, new)) for old, new in changes]
        if gains and max(gains) > LEAST_GAIN:
            old, new = changes[gains.index(max(gains))]
            groups[:] = [group for group in groups if group not in old] + list(new)

    def of(image: int) -> Group:
        return next(group for group in groups if image in group)

    for _ in range(SWEEPS):
        before = list(groups)
        simulated.add(groups)
        worst = sorted(range(len(peers)), key=lambda image: -simulated.left[of(image)][image])
        for image in worst:
            own, alone = of(image), frozenset([image])
            moves = [((own, other), (own - alone, other | alone)) for other in groups if other != own]
            take_best([*moves, ((own,), (own - alone, alone))])
        for place, image in enumerate(worst[:EXCHANGED]):
            own, one = of(image), frozenset([image])
            pairs = [(of(other), frozenset([other])) for other in worst[place + 1 :] if other not in own]
            take_best(((own, group), (own - one | two, group - two | one)) for group, two in pairs)
        take_best(((one, other), (one | other,)) for one, other in combinations(groups, 2))
        if groups == before:
            break
    found = torch.empty_like(peers)
    for number, group in enumerate(groups):
        found[list(group)] = number
    return found


class _Simulated:
    """Groups of images, each as one peer, with these sizes (N,) of the features.

    Attributes:
        left: what each leaves unexplained, by image.
    """

    def __init__(self, images: ShownErrors, sizes: Tensor) -> None:
        self.images, self.sizes = images, sizes
        self.left: dict[Group, dict[int, float]] = {}

    def total(self, group: Group) -> float:
        """Of all images of a group."""
        return sum(self.left[group].values())

    def add(self, groups: Iterable[Group]) -> None:
        """Simulate those of the groups that were not yet."""
        new = [group for group in dict.fromkeys(groups) if group not in self.left]
        while new:
            several, count = [], 0
            while new and (not several or count + len(new[-1]) <= AT_ONCE):
                several.append(new.pop())
                count += len(several[-1])
            which = torch.tensor([image for group in several for image in group])
            peers = torch.arange(len(several)).repeat_interleave(torch.tensor([len(group) for group in several]))
            left = iter(self.images.unexplained(peers, self.sizes, which)[0].tolist())
            self.left.update({group: {image: next(left) for image in group} for group in several})
