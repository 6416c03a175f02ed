"""DiffPIR against the paper's algorithm, and against the posterior of a prior of which everything is known."""

from typing import Any

import torch
from torch import Tensor

from attack_modules.enhance.diffpir import diffpir

SIZE = 8


def paper(
    prior: Any, y: Tensor, sigma_n: Tensor, alpha_bar: Tensor, noises: list[Tensor], lam: float, zeta: float
) -> Tensor:
    """Algorithm 1 of arXiv 2305.08995, variance preserving as there, from an iterate that is the noised observation."""
    x = alpha_bar[0].sqrt() * y + (1 - alpha_bar[0] - alpha_bar[0] * sigma_n**2).sqrt() * noises[0]
    for t, alpha in enumerate(alpha_bar):
        score = (alpha.sqrt() * prior(x / alpha.sqrt(), ((1 - alpha) / alpha).sqrt()) - x) / (1 - alpha)
        x0 = (x + (1 - alpha) * score) / alpha.sqrt()
        rho = lam * sigma_n**2 / ((1 - alpha) / alpha)
        x0 = (y + rho * x0) / (1 + rho)  # argmin |y - x|^2 + rho |x - x0|^2
        if t == len(alpha_bar) - 1:
            return x0
        eps = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        following = alpha_bar[t + 1]
        fresh = noises[t + 1] if zeta else 0.0
        x = following.sqrt() * x0 + (1 - following).sqrt() * ((1 - zeta) ** 0.5 * eps + zeta**0.5 * fresh)
    raise AssertionError


def test_it_is_the_papers(prior: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    observed = prior.sample(2, generator)
    sigma_y = torch.tensor(0.1).double()
    alpha_bar = torch.tensor([0.2, 0.6, 0.95, 0.999]).double()
    noises = list(torch.randn(4, 2, 1, SIZE, SIZE, dtype=torch.float64))
    for zeta in (0.0, 0.3):
        remaining = iter(noises)
        sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
        found = diffpir(prior, observed, sigma_y, sigmas, lambda: next(remaining), strength=7.0, zeta=zeta)  # noqa: B023
        expected = paper(prior, observed, sigma_y, alpha_bar, noises, 7.0, zeta)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


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
    found = diffpir(prior, observed, sigma_y, sigmas, noise)

    def error(images: Tensor, truth: Tensor) -> Tensor:
        return (images - truth).square().mean((0, 1, 2)).view(-1, 2).mean(0).sqrt()  # of sure and unsure columns

    sure, unsure = error(found, posterior)
    assert sure < 0.015  # less than the noise of 0.02
    assert unsure < 0.4 * error(observed, posterior)[1]
    one_level = prior(observed, torch.tensor(0.2).double())  # what a denoiser does that knows no map
    assert sure < 0.2 * error(one_level, posterior)[0]
    mean = diffpir(prior, observed, sigma_y, sigmas, lambda: torch.zeros_like(clean))
    assert (error(mean, posterior) < torch.tensor([0.1, 0.25]) * sigma_y[0, :2]).all()
