"""The noise level of images from a prior of which everything is known."""

from typing import Any

import pytest
import torch

from attack_modules.enhance.noise_level import likeliest_noise, wavelet_noise

CANDIDATES = torch.logspace(-2, 0, 13).double()


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_it_is_found(prior: Any, sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = prior.sample(64, generator)
    images += sigma * torch.randn(images.shape, dtype=torch.float64, generator=generator)
    noise = lambda: torch.randn(images.shape, dtype=torch.float64, generator=generator)  # noqa: E731
    found = likeliest_noise(prior, images, CANDIDATES, noise)
    assert found.shape == (64,)
    assert found.log().median().exp() == pytest.approx(sigma, rel=0.15)
    assert (found / sigma).log().std() < 0.6  # an image has 64 pixels only


def test_each_image_has_its_own(prior: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.02, 0.3]).double().repeat(32)
    images = prior.sample(64, generator)
    images += sigma[:, None, None, None] * torch.randn(images.shape, dtype=torch.float64, generator=generator)
    noise = lambda: torch.randn(images.shape, dtype=torch.float64, generator=generator)  # noqa: E731
    found = likeliest_noise(prior, images, CANDIDATES, noise)
    assert found[0::2].max() < found[1::2].min()


def test_wavelet_noise() -> None:
    noise = 0.2 * torch.randn(2, 3, 65, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wavelet_noise(noise + 0.5), torch.full((2,), 0.04), rtol=0.1, atol=0)
    assert wavelet_noise(torch.ones(1, 3, 1, 1)) == 0
