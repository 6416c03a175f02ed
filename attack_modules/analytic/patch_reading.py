"""The image whose patches the update of a patch embedding holds: least squares under a prior of smooth images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from attack_modules.analytic.patch_embedding import PatchEmbedding, PatchUpdate
from fl_lightning.models import ImageShape

BRIGHTNESS = 0.3
"""Standard deviation of the mean of a channel, around grey, that the prior expects."""
SMOOTHNESS = 0.12
"""Difference (root mean square) of neighbouring pixels of photographs at 64 pixels, with which a reading starts."""
LIMITS = (0.01, 0.5)
"""Of what is found instead, in any image."""
ITERATIONS = 300
"""Most conjugate gradient steps of one solution."""
CONVERGED = 1e-20
"""Share of the first squared residual, in the preconditioner's norm, at which a solution ends."""
BEYOND_ROUNDING = 1.5
"""Residual over that of rounding from which there is further noise. Measured without any: 0.9 to 1.1."""
LEAST_ERROR = 1e-10
"""Mean squared error below which a reading is called no better."""
TINY = torch.finfo(torch.float64).tiny
TESTABLE = 0.9
"""Most positions per equation (D for each round) at which a residual tells noise."""


class Estimate(NamedTuple):
    """What is known of an image."""

    image: Tensor
    """(C, H, W) float64."""
    smoothness: float
    """Difference (root mean square) of neighbouring pixels, of the image and of what is unknown of it."""
    noise: float
    """Standard deviation of noise in an entry of the update, beyond rounding."""


class Control(NamedTuple):
    """A made-up image that was read from updates with the same noise, to tell how good the reading is."""

    psnr: float
    """Of the reading against the made-up image, in dB."""
    spectrum: float
    """Median singular value of what is left of the made-up updates over that of the observed ones, in the round where
    it is largest: near 1 if what is left is noise, far above if it has few directions, as of further images. Measured:
    0.97 to 1.5 under rounding and Gaussian noise, 9 and more of two images."""


@dataclass(frozen=True)
class PatchReading:
    """One image from the updates of a patch embedding in some rounds.

    `products = errors^T patches(image)` is a linear equation, with noise on both sides. The prior expects that
    neighbouring pixels differ little: a Gaussian of the power spectrum of photographs. How much they differ, and how
    much noise there is beyond rounding, follow from the update (empirical Bayes), a step at a time.

    Attributes:
        embedding: of the model.
        updates: of the rounds, all of the same image.
        mean: (C, 1, 1) that the model subtracts, or (1, 1, 1).
        std: by which it divides.
        shape: (C, H, W) of the image.
    """

    embedding: PatchEmbedding
    updates: Sequence[PatchUpdate]
    mean: Tensor
    std: Tensor
    shape: ImageShape

    def start(self) -> Estimate:
        """Grey, and nothing known."""
        return Estimate(torch.full(self.shape, 0.5, dtype=torch.float64), SMOOTHNESS, 0.0)

    def step(self, known: Estimate) -> Estimate:
        """The most likely image given smoothness and noise, and then what these are."""
        system = _System(self, self.updates, known.noise)
        image = system.solve(system.evidence() + self.pull * 0.5, known)
        unknown = system.sample(known)
        smoothness = (_roughness(image) + _roughness(unknown)) ** 0.5
        return Estimate(image, min(max(smoothness, LIMITS[0]), LIMITS[1]), self._noise(image))

    @property
    def testable(self) -> bool:
        """Whether there are clearly more equations than unknowns, so that the residual tells something."""
        return self.embedding.positions <= TESTABLE * sum(len(update.products) for update in self.updates)

    @cached_property
    def signal(self) -> float:
        """Size of the update (root mean square) over its rounding errors, in the best round."""
        return max(u.products.square().mean().sqrt().item() / u.rounding[0] for u in self.updates)

    @property
    def pull(self) -> float:
        """Precision of a pixel around grey, such that the mean of a channel has the prior's."""
        return 1 / (BRIGHTNESS**2 * self.shape[1] * self.shape[2])

    def residual(self, image: Tensor) -> float:
        """Share of the updates (Frobenius norm) that an image (C, H, W) leaves unexplained."""
        left = sum(self._left(image, update).square().sum() for update in self.updates)
        return (left / sum(update.products.square().sum() for update in self.updates)).sqrt().item()

    def control(self, known: Estimate, seed: int = 1) -> Control:
        """Read an image that looks like the found one, with details of its own, from updates with the same noise.

        Args:
            known: what was found.
            seed: of details and noise.
        """
        generator = torch.Generator().manual_seed(seed)
        rough = known._replace(smoothness=max(known.smoothness, SMOOTHNESS))  # smooth where too noisy to be read
        errors = [_without_noise(update, known.noise) for update in self.updates]
        clean = [replace(update, errors=own, total=None) for update, own in zip(self.updates, errors, strict=True)]
        image = known.image + _System(self, clean, known.noise).sample(rough, seed)
        seen, made = self.patches(image), []
        for update, own in zip(self.updates, errors, strict=True):
            of_products, of_errors, of_total = _stds(update, known.noise)
            products = own.T @ seen + of_products * _normal(update.products.shape, generator)
            total = own.sum(0) + of_total * _normal(own.shape[1:], generator) if of_total else None
            made.append(PatchUpdate(products, own + of_errors * _normal(own.shape, generator), total, update.rounding))
        system = _System(self, made, known.noise)
        found = system.solve(system.evidence() + self.pull * 0.5, known)
        psnr = -10 * (found - image).square().mean().clamp_min(LEAST_ERROR).log10().item()
        left = [(self._left(found, m), self._left(known.image, u)) for m, u in zip(made, self.updates, strict=True)]
        medians = [[torch.linalg.svdvals(part).median().item() for part in pair] for pair in left]
        return Control(psnr, max(of_made / max(observed, TINY) for of_made, observed in medians))

    def patches(self, image: Tensor) -> Tensor:
        """(C, H, W) in [0, 1] -> (P, T) as the convolution sees them."""
        return self.embedding.patches(((image - self.mean) / self.std)[None])[0]

    def _left(self, image: Tensor, update: PatchUpdate) -> Tensor:
        """(D, T) what an image leaves of a round's products."""
        return update.products - _corrected(update, 0.0)[0].T @ self.patches(image)

    def _noise(self, image: Tensor) -> float:
        """Standard deviation of noise beyond rounding that the residual of an image shows."""
        if not self.testable:
            return 0.0
        seen = self.patches(image)
        equations = sum(len(update.products) for update in self.updates)
        left = sum(self._left(image, update).square().sum().item() for update in self.updates)
        left /= 1 - self.embedding.positions / equations  # the rest was fitted

        def expected(stds: Callable[[PatchUpdate], tuple[float, float, float]]) -> float:
            """Squared residual of noise with such standard deviations."""
            total = 0.0
            for update in self.updates:
                of_products, of_errors, of_total = stds(update)
                spread = (seen * (_covariance(len(seen), of_errors, of_total) @ seen)).sum().item()
                total += len(update.products) * (seen.shape[1] * of_products**2 + spread)
            return total

        rounding = expected(lambda update: update.rounding)
        if left <= BEYOND_ROUNDING**2 * rounding:
            return 0.0
        unit = expected(lambda update: (1.0, 1.0, 0.0 if update.total is None else 1.0))
        return ((left - rounding) / unit) ** 0.5


class _System:
    """The normal equations of an image, in the form in which conjugate gradients solve them.

    Args:
        reading: whose geometry counts.
        updates: of its rounds.
        noise: standard deviation beyond rounding.
    """

    def __init__(self, reading: PatchReading, updates: Sequence[PatchUpdate], noise: float) -> None:
        self.reading = reading
        self.pull = reading.pull
        positions, offset = reading.embedding.positions, reading.patches(torch.zeros(reading.shape).double())
        self.weights = torch.zeros(positions, positions, dtype=torch.float64)
        self.seen = torch.zeros_like(offset)
        for update in updates:
            errors, precision = _corrected(update, noise)[0], _stds(update, noise)[0] ** -2
            self.weights += precision * errors @ errors.T
            self.seen += precision * errors @ (update.products - errors.T @ offset)
        self.values, self.axes = torch.linalg.eigh(self.weights)
        self.values = self.values.clamp_min(0)
        inverse = reading.std.double().square().reciprocal().expand(reading.shape[0], 1, 1)
        kernel = reading.embedding.kernel[0] * reading.embedding.kernel[1]
        squared = self._scattered(self._gathered(torch.ones(reading.shape, dtype=torch.float64)))
        self.covered = squared > 0
        self.root = squared.where(self.covered, 1.0).sqrt()  # its inverse makes an isometry of what gathers patches
        self.scale = reading.embedding.overlap * inverse.flatten().repeat_interleave(kernel)  # (T,) at most

    def _gathered(self, image: Tensor) -> Tensor:
        return self.reading.embedding.patches((image / self.reading.std)[None])[0]

    def _scattered(self, patches: Tensor) -> Tensor:
        size = tuple(self.reading.shape[1:])
        return self.reading.embedding.scattered(patches[None], size)[0] / self.reading.std

    def evidence(self) -> Tensor:
        """(C, H, W) right side of the equations, but for the prior's."""
        return self._scattered(self.seen)

    def sample(self, known: Estimate, seed: int = 0) -> Tensor:
        """(C, H, W) what the image may differ by from its mean: a sample of the posterior, by perturbed equations."""
        generator = torch.Generator().manual_seed(seed)
        root = self.axes * self.values.sqrt()
        side = self._scattered(root @ _normal(self.seen.shape, generator))
        channels, height, width = self.reading.shape
        down = _normal((channels, height - 1, width), generator)
        right = _normal((channels, height, width - 1), generator)
        side += _divergence(down, right) / known.smoothness
        side += self.pull**0.5 * _normal(self.reading.shape, generator)
        return self.solve(side, known._replace(image=torch.zeros(self.reading.shape, dtype=torch.float64)))

    def solve(self, side: Tensor, known: Estimate) -> Tensor:
        """(C, H, W) solution for a right side, from `known.image` on."""
        stiffness = known.smoothness**-2
        diagonal = 2 * stiffness + self.pull

        def apply(image: Tensor) -> Tensor:
            smooth = _divergence(image.diff(dim=1), image.diff(dim=2))
            return self._scattered(self.weights @ self._gathered(image)) + stiffness * smooth + self.pull * image

        shrinkage = 1 / (diagonal + self.values[:, None] * self.scale)

        def precondition(image: Tensor) -> Tensor:  # exact where patches do not overlap and the prior is white
            seen = self._gathered(image / self.root)
            covered = self._scattered(self.axes @ (shrinkage * (self.axes.T @ seen))) / self.root
            return torch.where(self.covered, covered, image / diagonal)

        image = known.image.clone()
        residual = side - apply(image)
        size = (side * precondition(side)).sum()
        direction = preconditioned = precondition(residual)
        product = (residual * preconditioned).sum()
        for _ in range(ITERATIONS):
            if product <= CONVERGED * size:
                break
            applied = apply(direction)
            length = product / (direction * applied).sum()
            image, residual = image + length * direction, residual - length * applied
            preconditioned = precondition(residual)
            previous, product = product, (residual * preconditioned).sum()
            direction = preconditioned + product / previous * direction
        return image


def _stds(update: PatchUpdate, noise: float) -> tuple[float, float, float]:
    """Standard deviations of all noise in products, errors and total; 0 for a missing total."""
    stds = tuple((rounding**2 + noise**2) ** 0.5 for rounding in update.rounding)
    return stds if update.total is not None else (*stds[:2], 0.0)


def _covariance(positions: int, of_errors: float, of_total: float) -> Tensor:
    """(P, P) covariance of the noise in a column of errors whose sum was corrected by the total.

    Args:
        positions: P.
        of_errors: standard deviation in an entry of the errors.
        of_total: of the total; 0 without one.
    """
    covariance = of_errors**2 * torch.eye(positions, dtype=torch.float64)
    known = of_errors**4 / (of_total**2 + positions * of_errors**2) if of_total else 0.0
    return covariance - known


def _corrected(update: PatchUpdate, noise: float) -> tuple[Tensor, Tensor]:
    """(P, D) errors that agree with their total, and the covariance (P, P) of the noise in each column."""
    _, of_errors, of_total = _stds(update, noise)
    errors, positions = update.errors, len(update.errors)
    if of_total:
        share = of_errors**2 / (of_total**2 + positions * of_errors**2)
        errors = errors + share * (update.total - errors.sum(0))
    return errors, _covariance(positions, of_errors, of_total)


def _without_noise(update: PatchUpdate, noise: float) -> Tensor:
    """(P, D) errors as large as they are without noise, which raises their small singular values."""
    errors, covariance = _corrected(update, noise)
    values, axes = torch.linalg.eigh(errors @ errors.T)
    own = values - errors.shape[1] * ((axes.T @ covariance) * axes.T).sum(1)
    kept = (own.clamp_min(0) / values.clamp_min(torch.finfo(values.dtype).tiny)).sqrt()
    return axes @ (kept[:, None] * (axes.T @ errors))


def _divergence(down: Tensor, right: Tensor) -> Tensor:
    """The adjoint of the differences of neighbouring pixels: (C, H - 1, W) and (C, H, W - 1) -> (C, H, W)."""
    image = down.new_zeros(down.shape[0], right.shape[1], down.shape[2])
    image[:, 1:] += down
    image[:, :-1] -= down
    image[:, :, 1:] += right
    image[:, :, :-1] -= right
    return image


def _roughness(image: Tensor) -> float:
    """Mean squared difference of neighbouring pixels."""
    down, right = image.diff(dim=1), image.diff(dim=2)
    return ((down.square().sum() + right.square().sum()) / (down.numel() + right.numel())).item()


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
