"""DiffPIR against the paper's algorithm, and against the posterior of a prior of which everything is known."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.enhance.direct.diffpir import DiffPIR
from attack_modules.enhance.direct.sampler import upsample
from fl_lightning.errors import SettingError

SIZE = 8


def paper(
    prior: Any, y: Tensor, a: Tensor, start: Tensor, sigma_n: Tensor, alpha_bar: Tensor, noises: list[Tensor],
    lam: float, zeta: float,
) -> Tensor:  # fmt: skip
    """Algorithm 1 of arXiv 2305.08995, variance preserving as there, of `y = A x + n`, from an iterate near `start`."""
    x = alpha_bar[0].sqrt() * start + (1 - alpha_bar[0] - alpha_bar[0] * sigma_n**2).sqrt() * noises[0]
    for t, alpha in enumerate(alpha_bar):
        score = (alpha.sqrt() * prior(x / alpha.sqrt(), ((1 - alpha) / alpha).sqrt()) - x) / (1 - alpha)
        x0 = (x + (1 - alpha) * score) / alpha.sqrt()
        rho = lam * sigma_n**2 / ((1 - alpha) / alpha)
        normal = a.T @ a + rho * torch.eye(SIZE * SIZE).double()  # argmin |y - A x|^2 + rho |x - x0|^2
        x0 = torch.linalg.solve(normal, a.T @ y.flatten(1).T + rho * x0.flatten(1).T).T.view_as(x)
        if t == len(alpha_bar) - 1:
            return x0
        eps = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        following = alpha_bar[t + 1]
        fresh = noises[t + 1] if zeta else 0.0
        x = following.sqrt() * x0 + (1 - following).sqrt() * ((1 - zeta) ** 0.5 * eps + zeta**0.5 * fresh)
    raise AssertionError


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("zeta", [0.0, 0.3])
def test_it_is_the_papers(prior: Any, factor: int, zeta: float) -> None:
    """Of single pixels, and of means of 4x4 pixels (`prior.blocks`)."""
    generator = torch.Generator().manual_seed(0)
    means = F.avg_pool2d(prior.sample(2, generator), factor)
    start = upsample(means, factor)
    a = prior.blocks if factor == 4 else torch.eye(SIZE * SIZE).double()
    sigma_y = torch.tensor(0.1).double()
    alpha_bar = torch.tensor([0.2, 0.6, 0.95, 0.999]).double()
    noises = list(torch.randn(4, 2, 1, SIZE, SIZE, dtype=torch.float64))
    remaining = iter(noises)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    found = DiffPIR(7.0, zeta)(prior, means, sigma_y, sigmas, start, lambda: next(remaining))
    expected = paper(prior, means, a, start, sigma_y, alpha_bar, noises, 7.0, zeta)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_block_means_lead_near_the_mean_of_the_posterior(prior: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    sigma_y = torch.tensor(0.02).double()
    means = F.avg_pool2d(prior.sample(16, generator), 4)
    means = means + sigma_y * torch.randn(means.shape, dtype=torch.float64, generator=generator)
    start, sigmas = upsample(means, 4), torch.logspace(-0.5, -1.7, 20).double()
    found = DiffPIR()(prior, means, sigma_y, sigmas, start, lambda: torch.zeros_like(start))
    expected = prior.posterior_mean(means, sigma_y)
    assert (found - expected).square().mean() < 0.2 * (start - expected).square().mean()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="strength=0"):
        DiffPIR(strength=0.0)
    with pytest.raises(SettingError, match="zeta=2"):
        DiffPIR(zeta=2.0)


def test_sure_pixels_stay_and_unsure_ones_are_mended(prior: Any) -> None:
    """Half of an image is known ten times better: both halves must come nearer to the posterior mean."""
    generator = torch.Generator().manual_seed(0)
    clean = prior.sample(64, generator)
    sigma_y = torch.full((SIZE, SIZE), 0.2).double()
    sigma_y[:, ::2] = 0.02
    white = torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    observed = clean + sigma_y * white
    variance = torch.diag(sigma_y.flatten().square())
    gain = torch.linalg.solve(prior.covariance + variance, prior.covariance)
    posterior = (prior.mean + (observed.flatten(1) - prior.mean) @ gain).view_as(clean)
    sigmas = torch.logspace(torch.tensor(0.2).log10(), -2.3, 12).double()
    noise = lambda: torch.randn(clean.shape, dtype=torch.float64, generator=generator)  # noqa: E731
    found = DiffPIR(1.0)(prior, observed, sigma_y, sigmas, observed, noise)

    def error(images: Tensor, truth: Tensor) -> Tensor:
        return (images - truth).square().mean((0, 1, 2)).view(-1, 2).mean(0).sqrt()  # of sure and unsure columns

    sure, unsure = error(found, posterior)
    assert sure < 0.015  # less than the noise of 0.02
    assert unsure < 0.4 * error(observed, posterior)[1]
    one_level = prior(observed, torch.tensor(0.2).double())  # what a denoiser does that knows no map
    assert sure < 0.2 * error(one_level, posterior)[0]
    mean = DiffPIR(1.0)(prior, observed, sigma_y, sigmas, observed, lambda: torch.zeros_like(clean))
    assert (error(mean, posterior) < torch.tensor([0.1, 0.25]) * sigma_y[0, :2]).all()
