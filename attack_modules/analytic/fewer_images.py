"""Features from the rounds of a head by zeros, of fewer and fewer images: each one found is taken out of the rest.

In one full-batch step a round, an image of known features and class leaves known errors at the first layer's
outputs in every round, under a head of any number of layers (`hidden_labels.hidden_errors`). They lie in the column
space of the stacked gradients `G = A F`, which has N of R H dimensions. So they prove the image, and show its class;
and orthogonal to them, `G` holds one image less (`StackedRounds.without`), with the same noise.

So zeros (`sparse_rounds`), which show an image only if it has more of them than there are images, show those that have
most of them first, and then, among fewer images, the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.progress import Progress
from torch import Tensor

from attack_modules.analytic.hidden_labels import hidden_errors
from attack_modules.analytic.sparse_rounds import FRUITLESS, HOPELESS, MORE, ZeroSearch, solution_of
from attack_modules.analytic.stacked_rounds import FoundImages, StackedRounds

OUTSIDE = 1e-3
"""Share of an image's errors outside the column space, up to which they prove it. Measured: at most 1e-5; of a wrong
class 0.45 and more, and of mini-batches up to 0.29."""


@dataclass(frozen=True)
class Proof:
    """What the errors of n images say.

    Attributes:
        labels: (n,) long, those that fit best.
        errors: (R H, n) with them.
        outside: (n,) share of the errors outside the column space.
    """

    labels: Tensor
    errors: Tensor
    outside: Tensor

    @classmethod
    def of(cls, features: Tensor, layers: Sequence[Sequence[Tensor]], left: Tensor, smoothing: float) -> "Proof":
        """Try every class.

        Args:
            features: (n, D).
            layers: of each round, (out, in + 1) weights of each layer before it.
            left: (R H, N) orthonormal, of the column space.
            smoothing: of the labels.
        """
        errors = torch.cat([hidden_errors(features, each, smoothing) for each in layers], 2)  # (C, n, R H)
        lost = (errors - errors @ left @ left.T).norm(dim=2) / errors.norm(dim=2)
        outside, labels = lost.min(0)
        return cls(labels, errors[labels, torch.arange(len(labels))].T, outside)


def fewer_images(rounds: StackedRounds, layers: Sequence[Sequence[Tensor]], smoothing: float = 0.0) -> FoundImages:
    """The features of all images that zeros show and errors prove.

    Args:
        rounds: of the first layer, of one full-batch step each by the same peers.
        layers: of each round, (out, in + 1) weights of each layer before it.
        smoothing: of the labels.
    """
    size, rest, fruitless = rounds.num_images, rounds, 0
    tries = torch.zeros(rounds.basis.shape[1])
    found: list[FoundImages] = []
    count = 0
    with Progress(transient=True) as progress:
        task = progress.add_task(f"Zeros of {size} images' features, fewer and fewer", total=size)
        while count < size and fruitless < (FRUITLESS if count else HOPELESS):
            search = ZeroSearch(rest, tries)
            if MORE * rest.num_images > search.basis.shape[1]:
                break
            search.found = search.sweep()
            fruitless += 1
            if not search.found:
                continue
            shown = solution_of(search)
            proof = Proof.of(shown.features, layers, rounds.left, smoothing)
            proved = (proof.outside <= OUTSIDE).nonzero()[:, 0][: size - count]
            if not len(proved):
                continue
            fruitless, count = 0, count + len(proved)
            found.append(
                replace(
                    shown,
                    features=shown.features[proved],
                    expected_errors=shown.expected_errors[proved],
                    labels=proof.labels[proved],
                )
            )
            if count < size:
                rest = rest.without(proof.errors[:, proved])
            progress.update(task, completed=count)
    width, number = rounds.basis.shape[1] - 1, len(rounds.weights)
    return FoundImages(
        features=torch.cat([torch.zeros(0, width, dtype=torch.float64), *[f.features for f in found]]),
        expected_errors=torch.cat([torch.zeros(0, dtype=torch.float64), *[f.expected_errors for f in found]]),
        labels=torch.cat([torch.zeros(0, dtype=torch.long), *[f.labels for f in found]]),
        presence=torch.ones(number, count, dtype=torch.bool),
        num_images=size,
        evidence="zeros of their features, proved by their errors",
    )
