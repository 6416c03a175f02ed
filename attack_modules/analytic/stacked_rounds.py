"""The rounds of a linear head over a frozen backbone, stacked: how many images they hold, and the features' row space.

Whatever SGD's steps are, the update of a linear layer is a sum of the features of the images, weighted by errors. Under
a frozen backbone features do not change from round to round, so the gradients of R rounds, stacked, are `A F`, with
`F (N x D)` the features of all images (with a 1 for the bias). Their rank is N, and their row space is the features'.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attack_modules.attack import AttackError
from fl_lightning.errors import counted

VISIBLE = 5.0
"""Least ratio of singular values N and N + 1 at which the rank counts as visible."""
EVEN = 2.5
"""Singular value N + 1 over the root mean square of all beyond N, up to which these are of noise: 1 to 2 in theory
(Marchenko and Pastur). Measured: 1.4 under a frozen EfficientNet, 1.7 to 2.1 in synthetic rounds; 3.3 to 5.6 where a
gap shows fewer images than there are, the others of which noise hides."""
CLEAR = 1000.0
"""Ratio of singular values N and N + 1 from which nothing is taken to be hidden behind them. Measured: up to 80 where
images are; 5400 and more where rounding repeats itself."""
REPEATED = 6.0
"""As `EVEN`, behind a clear rank: what float32 rounds is alike in rounds that are alike. Measured: 3 of two images in
20 rounds, and 3.6 of 512 at a rate that overshoots."""
STILL = 0.5
"""Share of the weights that change in a round, relative to the round of most, up to which the round is left out: what
it changes is less than float32's rounding, or little more. Measured: a single image is learned in some ten rounds."""
CERTAIN = 0.05
"""Largest expected relative error of the features of a certified image."""


@dataclass(frozen=True)
class StackedRounds:
    """The rounds of a head, in an orthonormal basis of the row space of all their gradients.

    Attributes:
        weights: (R, C, N) the head before each round.
        left: (R C, N) orthonormal: the stacked gradients are `left * singular @ basis`.
        singular: (N,) singular values of the stacked gradients.
        basis: (N, D) orthonormal.
        noise: standard deviation of the independent noise in an entry of the gradients, as beyond the rank.
        gap: singular value N over singular value N + 1.
        biased: whether the last of the D features is the 1 of a bias.
    """

    weights: Tensor
    left: Tensor
    singular: Tensor
    basis: Tensor
    noise: float
    gap: float
    biased: bool

    @classmethod
    def of(cls, weights: Tensor, gradients: Tensor, biased: bool, num_images: int | None = None) -> "StackedRounds":
        """Find the rank.

        Args:
            weights: (R, C, D) the head before each round; a bias is its last column.
            gradients: (R, C, D) of the mean loss over the peers' images, in each round; summed over the local steps.
            biased: whether there is a bias.
            num_images: N, if it is told.

        Raises:
            AttackError: the rank is not below the number of equations, not visible, or what is beyond it is no noise.
        """
        rounds, classes, width = weights.shape
        moved = (gradients != 0).double().mean((1, 2))  # late rounds may change weights by less than their rounding
        gradients = gradients.double() * (moved > STILL * moved.max())[:, None, None]
        stacked = gradients.reshape(rounds * classes, width)
        left, singular, basis = torch.linalg.svd(stacked, full_matrices=False)
        used = gradients != 0
        rows, columns = int(used.any(2).sum()), int(used.flatten(0, 1).any(0).sum())
        most = min(rows - int(used.any(2).any(1).sum()), columns) - 1  # a round's errors of all classes add up to 0
        ratios = singular[:-1] / singular[1:].clamp_min(torch.finfo(torch.float64).tiny)
        found = num_images or (int(ratios[:most].argmax()) + 1 if most > 0 else 1)
        if found > most:
            raise AttackError(
                f"{counted(found, 'image')} cannot be told apart in {counted(rounds, 'round')} of {classes} classes "
                f"and {width} features: at most {max(most, 0)} can. Observe more rounds (`federation.observed_rounds`)."
            )
        gap = ratios[found - 1].item()
        if gap < VISIBLE:
            cause = "" if num_images is None else f"There may not be {counted(found, 'image')}, as is assumed; or r"
            raise AttackError(
                f"The stacked updates of {rounds} rounds show no rank: singular value {found} is only {gap:.2g} times "
                f"the next. {cause or 'R'}ounding or noise hides the images: the rounds change the predictions too "
                "little. Observe more rounds, earlier ones, or rounds of a higher learning rate."
            )
        rest = singular[found : min(rows, columns)]
        uneven = (rest[0] / rest.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)).item()
        if uneven > (REPEATED if gap > CLEAR else EVEN):
            raise AttackError(
                f"The stacked updates of {rounds} rounds seem to hold more than {counted(found, 'image')}, which noise "
                f"hides: singular value {found + 1} is {uneven:.2g} times those beyond, too much for noise. Observe "
                "more rounds, or rounds of a higher learning rate, or, of one or two images, the first rounds alone, "
                "since float32 rounds what the others change. Do not tell too small a number of images."
            )
        freedom = (rows - found) * (columns - found)
        return cls(
            weights=weights.double() @ basis[:found].T,
            left=left[:, :found],
            singular=singular[:found] * found,  # of the sum over the images
            basis=basis[:found],
            noise=found * (rest.square().sum() / freedom).sqrt().item() * max(uneven / EVEN, 1.0),  # as of the worst
            gap=gap,
            biased=biased,
        )

    @property
    def num_images(self) -> int:
        return len(self.singular)

    def without(self, errors: Tensor) -> "StackedRounds":
        """The rounds less k images, whose errors (R C, k) in all rounds are known.

        Orthogonal to these errors, the gradients are combinations of the other images' features alone, and their noise
        is the same.
        """
        others = torch.linalg.qr(self.left.T @ errors, mode="complete").Q[:, errors.shape[1] :]
        left, singular, basis = torch.linalg.svd(others.T * self.singular, full_matrices=False)
        return replace(
            self,
            weights=self.weights @ basis.T,
            left=self.left @ (others @ left),
            singular=singular,
            basis=basis @ self.basis,
        )

    @cached_property
    def gradients(self) -> Tensor:
        """(R C, N) the summed gradients in the basis."""
        return self.left * self.singular

    @property
    def one(self) -> Tensor | None:
        """(N,) the direction of the bias: its inner product with the coordinates of an image is 1."""
        return self.basis[:, -1] if self.biased else None


@dataclass(frozen=True)
class FoundImages:
    """Images that were found one by one, n of N.

    Attributes:
        features: (n, D) float64, without the 1 of a bias.
        expected_errors: (n,) relative errors of the features by noise as observed.
        labels: (n,) long; uncertain where images were not found, whose errors are taken for others'.
        presence: (R, n) bool: in which rounds an image was; the same holds.
        num_images: N.
        evidence: by which they were found.
    """

    features: Tensor
    expected_errors: Tensor
    labels: Tensor
    presence: Tensor
    num_images: int
    evidence: str

    @property
    def certified(self) -> Tensor:
        """(n,) bool."""
        return self.expected_errors <= CERTAIN
