"""Features from the rounds of a linear head over a frozen backbone that ends in a ReLU, however the peers train.

Whatever SGD's steps are (several peers, local epochs, mini-batches in any order, momentum, other participants in each
round), the update of a linear layer is a sum of the features of the images, weighted by errors. So the row space of all
observed updates, stacked, is that of the features, as in `joint_rounds`. Features behind a ReLU are not negative, and
many are exactly 0, of each image others: so they are the vectors of this space with most zeros (`sparse_features`).
Neither labels nor rates nor anything else of the training is needed to find them; the errors that the found features
leave in the updates then show labels, and in which rounds an image was.

That a vector is an image's is certified by its zeros alone: it must be the only one of the space that is 0 there. A
sum of two images is 0 where both are, and there each of them is 0 too. As the noise of the updates is known from what
is beyond their rank, "0" and "the only one" are statements about singular values: with `B (N, D)`, whose rows span the
space and whose entries have independent noise of one size s, and S the zeros, the least singular value of `B[:, S]` is
about `s |S|^(1/2)`, and the second must be far above.

A vector is searched for along a feature that the images found so far have little of: what is left of it is often of one
image above all, which is then the sparsest vector with a given value of this feature (Spielman, Wang and Wright, 2012,
whose starts are such columns, too). Random directions are shared by all images, and lead to few of 256.

A search of one vector takes `80 N^2 D` flops of float32, a certificate up to `8 N^2 D + 30 N^3`; memory is for
`24 N (D + N)` numbers.
"""

from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.sparse_features import STARTS, sparser
from attack_modules.analytic.stacked_rounds import FoundImages, StackedRounds

SLOW = tuple(0.3 * 0.03 ** (i / 39) for i in range(40))
"""As `sparse_features.COARSE`, in smaller steps: of 24 features, 6 led to one of 256 images; in 20 steps, 1."""
TRIED = 0.8
"""Factor on what is left of a feature for each search that began with it."""
FRUITLESS = 12
"""Sweeps in a row that find no image, after which the search ends."""
HOPELESS = 3
"""The same, where none has been found at all: a sweep of 512 images takes half a minute of a core."""
WITHIN = 4.0
"""Standard deviations of the noise within which an entry counts as 0."""
ROUGH = 0.05
"""The same at first, in units of the mean positive entry."""
REFINEMENTS = 8
"""Steps from one to the other."""
MORE = 1.25
"""Zeros for each image of the space, from which they mean something: any N - 1 entries of a vector can be made 0."""
ALONE = 4.0
"""Least ratio of the second singular value on the zeros to what noise makes of one."""
NEGATIVE = 0.01
"""Share of a vector's entries below 0 by more than `WITHIN` from which it is no image's."""
APART = 0.01
"""Sine of the angle between two images, in the metric of the noise, from which on they are different."""
ABSENT = 0.02
"""Error of an image in a round, relative to its largest, up to which it was not there, if noise explains it, too."""


@dataclass(frozen=True)
class Candidate:
    """A vector that alone has its zeros.

    Attributes:
        direction: (N,) of length 1, coefficients of the rows of B.
        inside: expected squared error of its entries by other coefficients, for a vector of length 1.
    """

    direction: Tensor
    inside: float


class ZeroSearch:
    """Looks for the vectors with most zeros in the row space of stacked rounds.

    Args:
        rounds: of a head with a bias, over features that are not negative.
        tries: (D - 1,) searches that began with each feature so far, which is kept up to date; None for none.
    """

    def __init__(self, rounds: StackedRounds, tries: Tensor | None = None) -> None:
        self.rounds = rounds
        self.scaled = (rounds.singular[:, None] * rounds.basis)[:, :-1]  # B: entries of independent noise
        self.ones = rounds.singular * rounds.basis[:, -1]
        used = rounds.basis[:, :-1].norm(dim=0)
        self.used = (used > 1e-3 * used.max()).nonzero()[:, 0]
        self.basis = rounds.basis[:, self.used]
        self.tries = torch.zeros(len(used)) if tries is None else tries
        self.found: list[Candidate] = []

    def certify(self, direction: Tensor, seen: Tensor | None = None) -> Candidate | None:
        """Adjust a vector to its zeros, and see whether it is the only one that has them, and a new one.

        Args:
            direction: (N,) coefficients of the rows of B.
            seen: (n, N) of the images that were found before.
        """
        noise, size = self.rounds.noise, len(direction)
        direction = direction / direction.norm()
        coarse = ROUGH * (direction @ self.scaled).clamp_min(0).mean().item()
        finest = WITHIN * noise
        for step in range(1, REFINEMENTS + 1):
            bound = finest * max(coarse / finest, 1.0) ** (1 - step / REFINEMENTS)
            zeros = self.scaled[:, (direction @ self.scaled).abs() < bound]
            count = zeros.shape[1]
            if count < MORE * size:
                return None
            gram = zeros @ zeros.T
            if step < REFINEMENTS:
                direction = nearly_null(gram, direction)
        if seen is not None and ((seen @ direction).square() > 1 - APART**2).any():
            return None
        values, vectors = torch.linalg.eigh(gram)
        direction = vectors[:, 0]
        largest = noise * (count**0.5 + size**0.5)  # singular value of noise alone
        if values[0] > (ALONE * largest) ** 2 or (values[1:2] < (ALONE * largest) ** 2).any():  # a single image has one
            return None
        direction = direction * (direction @ self.ones).sign()
        if ((direction @ self.scaled) < -WITHIN * noise).double().mean() > NEGATIVE:
            return None
        spread = (vectors[:, 1:].T @ self.scaled).square().sum(1)
        return Candidate(direction, (noise**2 * spread / values[1:]).sum().item())

    def sweep(self) -> list[Candidate]:
        """Further images, searched along features of which the found ones have little."""
        along = self.starts().to(torch.float32)
        new: list[Candidate] = []
        for vector in sparser(self.basis.to(along), along, SLOW, along).double():
            seen = torch.cat([self.directions, *[other.direction[None] for other in new]])
            candidate = self.certify(vector / self.rounds.singular, seen)
            if candidate is not None:
                new.append(candidate)
        return new

    def starts(self) -> Tensor:
        """(STARTS, N) of length 1: different features without the part that lies in the found images' directions."""
        known = F.normalize(self.directions * self.rounds.singular, dim=1)  # in the orthonormal basis
        others = torch.linalg.svd(known, full_matrices=True).Vh[len(known) :]
        rest = others @ self.basis
        chosen: list[int] = []
        for number in range(STARTS):
            if number % len(others) == 0:
                left = rest / self.basis.norm(dim=0) * TRIED ** self.tries[self.used]
            chosen.append(int(left.norm(dim=0).argmax()))
            self.tries[self.used[chosen[-1]]] += 1
            axis = F.normalize(left[:, chosen[-1]], dim=0)
            left = left - axis[:, None] * (axis @ left)
        return F.normalize(rest[:, chosen].T @ others, dim=1)

    @property
    def directions(self) -> Tensor:
        """(n, N) coefficients of the found images."""
        return (
            torch.stack([c.direction for c in self.found]) if self.found else self.basis.new_zeros(0, len(self.basis))
        )


def nearly_null(gram: Tensor, near: Tensor) -> Tensor:
    """(N,) eigenvector of the least eigenvalue of a `gram` (N, N), by inverse iterations from a vector `near` it."""
    inverted = gram + 1e-15 * gram.trace() * torch.eye(len(gram)).to(gram)
    for _ in range(2):
        near = F.normalize(torch.linalg.solve(inverted, near), dim=0)
    return near


def sparse_rounds(rounds: StackedRounds) -> FoundImages:
    """The features of all images whose zeros tell them apart.

    Args:
        rounds: of a head with a bias, as `StackedRounds.of` finds them.
    """
    search, fruitless = ZeroSearch(rounds), 0
    possible = MORE * rounds.num_images <= search.basis.shape[1]
    with Progress(transient=True) as progress:
        task = progress.add_task(f"Zeros of {rounds.num_images} images' features", total=rounds.num_images)
        while (
            possible and len(search.found) < rounds.num_images and fruitless < (FRUITLESS if search.found else HOPELESS)
        ):
            new = search.sweep()
            fruitless = 0 if new else fruitless + 1
            search.found += new[: rounds.num_images - len(search.found)]
            progress.update(task, completed=len(search.found))
    return solution_of(search)


def solution_of(search: ZeroSearch) -> FoundImages:
    """Scale the found vectors by the 1 of the bias, and read labels and presence from the errors that they leave."""
    rounds, directions = search.rounds, search.directions
    number, classes, _ = rounds.weights.shape
    directions = directions / (directions @ search.ones)[:, None]
    noise = rounds.noise * directions.norm(dim=1)  # of each entry
    features = (directions @ search.scaled).clamp_min(0)
    inside = torch.tensor([c.inside for c in search.found], dtype=torch.float64) * directions.square().sum(1)
    outside = noise.square() * ((features > 0).sum(1) + features.square().sum(1))  # by the scale, too
    dual = torch.linalg.pinv(directions * rounds.singular)
    errors = (rounds.gradients @ dual).view(number, classes, -1)
    norms = errors.norm(dim=1)
    mistaken = 3 * dual.norm(dim=0) * (classes * rounds.noise**2 + norms.square() @ inside)[:, None].sqrt()
    return FoundImages(
        features=features,
        expected_errors=(inside + outside).sqrt() / features.norm(dim=1),
        labels=errors.sum(0).argmin(0),
        presence=(norms > mistaken) | (norms > ABSENT * norms.amax(0)),
        num_images=rounds.num_images,
        evidence="zeros of their features",
    )
