"""Features from the rounds of a linear head over a frozen backbone, one image at a time, by its errors in all rounds.

With one full-batch step a round, the stacked gradients of R rounds are `G = A F`, as in `joint_rounds`. There the
features of all N images are unknown at once, which is N x N numbers. But each column of A is one image's alone: an
image of class c with features f leaves the errors `e(f) = softmax(W_t f) - t_c` in rounds t = 1..R, and they lie in
the column space of G, which is known and has N dimensions. In the row space, f has N coordinates x. So each image by
itself solves

    (1 - L L^T) e(x) = 0        with L (R C x N) an orthonormal basis of the column space,

R (C - 1) - N equations for N unknowns: with `R (C - 1) > 2 N` the images are the only solutions, and each is found by
a Levenberg-Marquardt iteration of its own. Nothing is asked of the features, and images may share classes.

An image that was found takes one dimension away: the coordinates of all others are orthogonal to `S^-1 L^T e` (S the
singular values of G), as `A = L S X^-1`. So none is found twice, and the search becomes cheaper with every image.
Where the errors of all are known, the features follow from `G = A F`; those of single images are far less exact,
since there are directions of the row space that hardly change what the head says.

Starts: in the column space, directions that lie mostly in the rows of one class are nearly those of its images; their
dual vectors span the class' part of the row space roughly, and one start after the other is drawn from it.

An iteration takes `R C (2 d^2 + 4 N d) + d^3 / 3` flops, with d the dimensions that are left; memory is for `3 R C N`
numbers. A start takes some 20 iterations.
"""

import math
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.stacked_rounds import CERTAIN, FoundImages, StackedRounds

EQUATIONS = 2.2
"""Rounds times classes less one, over images, from which the images are taken for the only solutions."""
EXPLAINED = 5.0
"""Errors outside the column space, in units of what noise leaves there, up to which an image is found. Measured: 1 to 5
of images, 1000 and more in wrong minima."""
CLOSE = 2e4
"""The same, up to which images found before are taken to disturb the search, by the noise of their own errors: it goes
on without regard to them. With 200, the search of 512 images came to a halt at 295."""
FRUITLESS = 3
"""Sweeps in a row that find no image, after which the search ends; one, where none was found at all."""
CLEAR = 3.0
"""The same, at which an iteration ends."""
ITERATIONS = 60
"""Most of each start. Measured: 10 to 40."""
SLOW = 0.8
"""Factor by which the cost has to fall in an iteration, or in one of the next `PATIENCE`."""
PATIENCE = 5
TRIES = 12
"""Raises of the damping before an iteration is given up."""
LEAST_DAMPING = 1e-12
WEIGHT_OF_ONE = 100.0
"""Of the squared error of the bias' 1, beside the share of the errors outside the column space."""


@dataclass(frozen=True)
class Iterate:
    """A trial of one image's coordinates in d directions.

    Attributes:
        coordinates: (d,).
        probabilities: (R, C).
        errors: (R C,).
        outside: (R C,) their part outside the column space.
        one: of the bias, less 1.
        cost: share of the errors outside, and the weighted error of the 1, squared.
    """

    coordinates: Tensor
    probabilities: Tensor
    errors: Tensor
    outside: Tensor
    one: Tensor
    cost: float


class ErrorSearch:
    """Looks for images one by one.

    Args:
        rounds: of a head with a bias, of one full-batch step each.
        smoothing: of the labels.
        seed: of the starts.

    Attributes:
        labels: (n,) of the images found so far.
        coordinates: (n, N) in the row space, each from its own errors alone.
        errors: (n, R C).
        ratios: of their part outside the column space over what noise leaves there.
    """

    def __init__(self, rounds: StackedRounds, smoothing: float = 0.0, seed: int = 0) -> None:
        number, self.classes, size = rounds.weights.shape
        self.rounds = rounds
        self.targets = torch.eye(self.classes).to(rounds.left) * (1 - smoothing) + smoothing / self.classes
        self.generator = torch.Generator().manual_seed(seed)
        self.labels: list[int] = []
        self.ratios: list[float] = []
        self.coordinates = rounds.left.new_zeros(0, size)
        self.errors = rounds.left.new_zeros(0, number * self.classes)
        self._all = torch.eye(size).to(rounds.left)
        self._free, self._weights = self._all, rounds.weights  # directions of images not found, and the weights in them

    def duals(self) -> Tensor:
        """(n, N), to which the coordinates of all other images are orthogonal, and of length 1 along their own."""
        return self.errors @ self.rounds.left / self.rounds.singular

    def ratio(self, at: Iterate) -> float:
        """Length of the errors outside the column space, over what the observed noise leaves there."""
        rounds = self.rounds
        dual = (rounds.left.T @ at.errors / rounds.singular).norm().item()
        noise = rounds.noise * (len(rounds.left) - rounds.num_images) ** 0.5 * dual
        return at.outside.norm().item() / max(noise, torch.finfo(torch.float64).tiny)

    def solve(self, start: Tensor, label: int, damping: float = 1e-2, alone: bool = True) -> tuple[Tensor, Iterate]:
        """Levenberg-Marquardt from coordinates (N,), as an image of class `label`; (N,) solution, and what it is like.

        Args:
            start: (N,).
            label: c.
            damping: at the beginning.
            alone: whether only directions are searched that the images found before leave.
        """
        free, weights = (self._free, self._weights) if alone else (self._all, self.rounds.weights)
        one = self.rounds.basis[:, -1] @ free

        def trial(coordinates: Tensor) -> Iterate:
            probabilities = (weights @ coordinates).softmax(1)
            errors = (probabilities - self.targets[label]).view(-1)
            outside = errors - self.rounds.left @ (self.rounds.left.T @ errors)
            off = one @ coordinates - 1
            share = outside.square().sum() / errors.square().sum()
            cost = (share + WEIGHT_OF_ONE * off.square()).item()
            return Iterate(coordinates, probabilities, errors, outside, off, cost)

        at, slow = trial(start @ free), 0
        for _ in range(ITERATIONS):
            jacobian, normal = self._linearised(at, weights)
            scale = at.errors.square().sum()
            normal = normal / scale + WEIGHT_OF_ONE * torch.outer(one, one)
            slope = jacobian.T @ at.outside / scale + WEIGHT_OF_ONE * at.one * one
            metric = normal.diagonal().mean() * torch.eye(len(one)).to(normal)
            for _ in range(TRIES):
                factor, failed = torch.linalg.cholesky_ex(normal + damping * metric)
                if not failed:
                    ahead = trial(at.coordinates - torch.cholesky_solve(slope[:, None], factor)[:, 0])
                    if ahead.cost < at.cost:
                        break
                damping *= 4
            else:
                break
            slow = slow + 1 if ahead.cost > SLOW * at.cost else 0
            at, damping = ahead, max(damping / 6, LEAST_DAMPING)
            if slow >= PATIENCE or self.ratio(at) < CLEAR:
                break
        return free @ at.coordinates, at

    def _linearised(self, at: Iterate, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(R C, d) derivatives of the errors, and (d, d) those of their part outside the column space, squared."""
        soft = at.probabilities[:, :, None]
        jacobian = soft * (weights - (soft * weights).sum(1, keepdim=True))
        jacobian = jacobian.view(len(at.errors), -1)
        inside = self.rounds.left.T @ jacobian
        return jacobian, jacobian.T @ jacobian - inside.T @ inside

    def parts(self) -> tuple[Tensor, Tensor]:
        """Where the images that are left lie, roughly: (M, N) directions of the row space, and their classes (M,)."""
        left = self.rounds.left.view(-1, self.classes, self.rounds.num_images)
        known = F.normalize(self.errors @ self.rounds.left, dim=1)
        labels = torch.tensor(self.labels, dtype=torch.long)
        values, vectors, classes = [], [], []
        for label in range(self.classes):
            own = torch.linalg.qr(known[labels == label].T).Q
            rows = left[:, label] - left[:, label] @ own @ own.T
            _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
            values.append(singular)
            vectors.append(directions)
            classes.append(torch.full((len(singular),), label))
        largest = torch.cat(values).argsort(descending=True)[: self.rounds.num_images - len(known)]
        dual = torch.linalg.pinv(torch.cat([known, torch.cat(vectors)[largest]])).T * self.rounds.singular
        return dual[len(known) :], torch.cat(classes)[largest]

    def start(self, directions: Tensor) -> Tensor:
        """(N,) random coordinates in the span of directions (k, N), with the 1 of the bias."""
        inside = torch.linalg.qr((directions @ self._free).T).Q @ torch.eye(len(directions)).to(directions)
        one = self.rounds.basis[:, -1] @ self._free @ inside
        drawn = F.normalize(torch.randn(len(one), generator=self.generator, dtype=torch.float64), dim=0)
        drawn = drawn * (drawn @ one).sign() + F.normalize(one, dim=0)
        return self._free @ (inside @ drawn) / (drawn @ one)

    def attempt(self, start: Tensor, label: int) -> bool:
        """Whether an image was found from coordinates (N,)."""
        found, at = self.solve(start, label)
        if EXPLAINED < self.ratio(at) < CLOSE and self.labels:
            found, at = self.solve(found, label, 1e-9, alone=False)
        ratio = self.ratio(at)
        if (
            not ratio <= EXPLAINED or (self.duals() @ found > 0.5).any()
        ):  # 1 of an image that was found before, 0 of others
            return False
        self.labels.append(label)
        self.ratios.append(ratio)
        self.coordinates = torch.cat([self.coordinates, found[None]])
        self.errors = torch.cat([self.errors, at.errors[None]])
        along = self.duals()[-1] @ self._free  # of the directions that are left, this one is the image's: mirrored away
        mirror = along.clone()
        mirror[0] += torch.copysign(along.norm(), along[0])
        mirror = F.normalize(mirror, dim=0)
        self._free, self._weights = (
            (inside - 2 * (inside @ mirror)[..., None] * mirror)[..., 1:] for inside in (self._free, self._weights)
        )
        return True

    def search(self) -> None:
        """Sweep over the classes."""
        size, fruitless = self.rounds.num_images, 0
        with Progress(transient=True) as progress:
            task = progress.add_task(f"Errors of {size} images", total=size)
            while len(self.labels) < size and fruitless < (FRUITLESS if self.labels else 1):
                directions, classes = self.parts()
                new = False
                for label in classes.tolist():
                    if len(self.labels) < size:
                        new |= self.attempt(self.start(directions[classes == label]), label)
                        progress.update(task, completed=len(self.labels))
                if not new:  # the classes of the last images are not told
                    for label in range(self.classes):
                        if len(self.labels) < size:
                            new |= self.attempt(self.start(self._free.T), label)
                            progress.update(task, completed=len(self.labels))
                fruitless = 0 if new else fruitless + 1

    def solution(self) -> FoundImages:
        """Features that all errors explain together, and how far off noise makes them; only certified images."""
        rounds, duals = self.rounds, self.duals()
        found = self.coordinates + (torch.eye(len(duals)).to(duals) - self.coordinates @ duals.T) @ torch.linalg.pinv(
            duals.T
        )
        features = found @ rounds.basis
        expected = self._expected_squares(found).sqrt() / features.norm(dim=1)
        known = expected <= CERTAIN
        return FoundImages(
            features=features[known, :-1],
            expected_errors=expected[known],
            labels=torch.tensor(self.labels, dtype=torch.long)[known],
            presence=torch.ones(len(rounds.weights), int(known.sum()), dtype=torch.bool),
            num_images=rounds.num_images,
            evidence="errors of each in all rounds",
        )

    def _expected_squares(self, found: Tensor) -> Tensor:
        """(n,) squared errors of coordinates (n, N), in first order.

        Noise of the gradients enters by `F = A^+ G` itself, by the errors of each image, and, of directions that only
        images not found would settle, by the image's own coordinates.
        """
        rounds, duals = self.rounds, self.duals()
        readers = rounds.left @ (found / rounds.singular).T  # (R C, n): of the errors of all images, each its own
        squares = readers.square().sum(0) * rounds.basis.shape[1]
        one = rounds.basis[:, -1]
        with Progress(transient=True) as progress:
            for place in progress.track(range(len(found)), description="Expected errors of features"):
                probabilities = (rounds.weights @ self.coordinates[place]).softmax(1)
                errors = self.errors[place]
                at = Iterate(self.coordinates[place], probabilities, errors, errors, one[0], math.nan)
                jacobian, normal = self._linearised(at, rounds.weights)
                normal = normal + WEIGHT_OF_ONE * errors.square().sum() * torch.outer(one, one)
                normal.diagonal().add_(1e-15 * normal.trace())
                half = torch.linalg.cholesky(normal)
                own = max(self.ratios[place], 1.0) ** 2 * duals[place].square().sum()
                moved = torch.linalg.solve_triangular(half, jacobian.T @ readers, upper=False).square().sum(0)
                squares += own * moved * found[place].square().sum()
                if self._free.shape[1]:
                    loose = torch.linalg.solve_triangular(half, self._free, upper=False)
                    squares[place] += own * loose.square().sum()
        return squares * rounds.noise**2


def error_series(rounds: StackedRounds, smoothing: float = 0.0, seed: int = 0) -> FoundImages:
    """The features of all images that are found by their errors, and certified.

    Args:
        rounds: of a head with a bias, of one full-batch step each, by the same peers.
        smoothing: of the labels.
        seed: of the starts.
    """
    search = ErrorSearch(rounds, smoothing, seed)
    search.search()
    return search.solution()
