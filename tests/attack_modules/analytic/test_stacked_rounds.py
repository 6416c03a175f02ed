"""How many images stacked rounds hold, where float32 leaves weights as they are."""

import pytest
import torch
from torch import Tensor

from attack_modules.analytic.stacked_rounds import EVEN, StackedRounds
from attack_modules.attack import AttackError


def rounds_of(images: int, rounds: int, noise: float) -> Tensor:
    """(R, 12, 33) gradients with noise, in which the first four rows never change."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, 33, generator=generator)
    gradients = torch.randn(rounds, 12, images, generator=generator) @ features
    gradients += noise * torch.randn(gradients.shape, generator=generator)
    gradients[:, :4] = 0
    return gradients.double()


def test_rows_that_never_change_are_no_rank() -> None:
    gradients = rounds_of(5, 2, 1e-6)
    found = StackedRounds.of(torch.zeros_like(gradients), gradients, biased=True)
    assert found.num_images == 5  # 16 rows change, and behind singular value 16 nothing is left at all
    assert 0.3e-6 < found.noise / 5 < 3e-6


def test_rounds_that_change_few_weights_are_left_out() -> None:
    gradients = rounds_of(2, 6, 1e-6)
    coarse = 1e-3 * torch.randn(gradients.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients[4:] = coarse[4:] * (coarse[4:].abs() > 1.3e-3)  # a fifth, by rounding alone
    found = StackedRounds.of(torch.zeros_like(gradients), gradients, biased=True)
    assert found.num_images == 2
    assert found.noise / 2 < 3e-6


def test_rounding_that_repeats_itself_counts_as_noise_behind_a_clear_rank_alone() -> None:
    gradients = rounds_of(2, 8, 1e-6)
    repeated = (gradients != 0).double() / (gradients != 0).double().norm()  # of singular value 1
    even = StackedRounds.of(torch.zeros_like(gradients), gradients, biased=True)
    level = even.noise / 2 * 64**0.5  # root mean square of the singular values of noise
    found = StackedRounds.of(torch.zeros_like(gradients), gradients + 4 * level * repeated, biased=True)
    assert found.num_images == 2
    assert 1.4 < found.noise / even.noise < 2 * 4 / EVEN
    hidden = gradients + 1e-2 * torch.randn(gradients.shape, generator=torch.Generator().manual_seed(2)).double()
    with pytest.raises(AttackError, match="seem to hold more than 2 images"):
        StackedRounds.of(torch.zeros_like(gradients), hidden + 4e4 * level * repeated, biased=True)
