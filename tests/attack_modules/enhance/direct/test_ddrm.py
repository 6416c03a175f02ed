"""DDRM against the paper's equations, written out over singular vectors, with a prior of which everything is known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.enhance.direct.ddrm import DDRM
from attack_modules.enhance.direct.sampler import upsample
from fl_lightning.errors import SettingError

SIZE, FACTOR = 8, 4
PIXELS = SIZE * SIZE


def paper(
    prior: Any, y: Tensor, sigma_y: Tensor, sigmas: Tensor, start: Tensor, noises: list[Tensor], eta: float,
    eta_b: float,
) -> Tensor:  # fmt: skip
    """Equations 4, 7 and 8 of arXiv 2201.11793, one image (pixels,), one singular vector at a time."""
    s = torch.cat([torch.full((len(y),), 1 / FACTOR), torch.zeros(PIXELS - len(y))]).double()
    basis = torch.linalg.qr(torch.cat([prior.blocks.T * FACTOR, torch.eye(PIXELS).double()], 1)).Q
    basis[:, : len(y)] = prior.blocks.T * FACTOR  # QR may flip their signs
    torch.testing.assert_close((s[: len(y), None] * basis.T[: len(y)]), prior.blocks)  # H = U S V^T, with U = 1
    y_bar, level = torch.zeros(PIXELS).double(), torch.zeros(PIXELS).double()
    y_bar[: len(y)], level[: len(y)] = y / s[: len(y)], sigma_y / s[: len(y)]
    x = torch.zeros(PIXELS).double()
    start, drawn = basis.T @ start, basis.T @ noises[0]
    for i in range(PIXELS):
        if s[i] > 0 and sigmas[0] > level[i]:
            x[i] = y_bar[i] + (sigmas[0] ** 2 - level[i] ** 2).sqrt() * drawn[i]
        else:
            x[i] = start[i] + sigmas[0] * drawn[i]
    for t in range(len(sigmas)):
        clean = basis.T @ prior((basis @ x).view(1, 1, SIZE, SIZE), sigmas[t]).flatten()
        if t == len(sigmas) - 1:
            return basis @ clean
        sigma, drawn = sigmas[t + 1], basis.T @ noises[t + 1]
        for i in range(PIXELS):
            if s[i] == 0:
                x[i] = clean[i] + (1 - eta**2) ** 0.5 * sigma * (x[i] - clean[i]) / sigmas[t] + eta * sigma * drawn[i]
            elif sigma < level[i]:
                x[i] = (
                    clean[i] + (1 - eta**2) ** 0.5 * sigma * (y_bar[i] - clean[i]) / level[i] + eta * sigma * drawn[i]
                )
            else:
                spread = (sigma**2 - level[i] ** 2 * eta_b**2).sqrt()
                x[i] = (1 - eta_b) * clean[i] + eta_b * y_bar[i] + spread * drawn[i]
    raise AssertionError


@pytest.fixture
def observe(prior: Any) -> Callable[[int, Tensor], Tensor]:
    def run(count: int, sigma_y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        means = F.avg_pool2d(prior.sample(count, generator), FACTOR)
        return means + sigma_y * torch.randn(means.shape, dtype=torch.float64, generator=generator)

    return run


UNIFORM = torch.tensor(0.05).double()
MAP = torch.tensor([[0.0, 0.02], [0.05, 0.3]]).double()


@pytest.mark.parametrize("sigma_y", [UNIFORM, MAP], ids=["one level", "a level a block"])
@pytest.mark.parametrize("first", [70.0, 0.5, 0.1], ids=["from far", "from near", "from within the noise"])
@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.3, 0.4)])
def test_it_is_the_papers(
    prior: Any,
    observe: Callable[[int, Tensor], Tensor],
    sigma_y: Tensor,
    first: float,
    eta: float,
    eta_b: float,
) -> None:
    """From small noise too, where a factor on the first iterate would show."""
    means = observe(2, sigma_y)
    sigmas = torch.logspace(torch.tensor(first).log10(), -2, 6).double()
    noises = list(torch.randn(6, 2, 1, SIZE, SIZE, dtype=torch.float64))
    start = torch.full((2, 1, SIZE, SIZE), 0.4).double()
    remaining = iter(noises)
    found = DDRM(eta, eta_b)(prior, means, sigma_y, sigmas, start, lambda: next(remaining))
    for i in range(2):
        expected = paper(prior, means[i].flatten(), sigma_y.expand(2, 2).flatten(), sigmas, start[i].flatten(),
                         [noise[i].flatten() for noise in noises], eta, eta_b)  # fmt: skip
        torch.testing.assert_close(found[i].flatten(), expected, atol=1e-10, rtol=1e-10)


def test_exact_means_are_kept(prior: Any, observe: Callable[[int, Tensor], Tensor]) -> None:
    means = observe(3, torch.tensor(0.0))
    sigmas = torch.logspace(1, -4, 12).double()
    found = DDRM()(
        prior, means, torch.tensor(0.0), sigmas, upsample(means, FACTOR), lambda: torch.randn(3, 1, SIZE, SIZE).double()
    )
    torch.testing.assert_close(F.avg_pool2d(found, FACTOR), means, atol=1e-3, rtol=0)


def test_the_mean_of_samples_is_near_that_of_the_posterior(
    prior: Any, observe: Callable[[int, Tensor], Tensor]
) -> None:
    """Much nearer than the means or the prior alone. Its spread is too small, as the original's is.

    Without noise, it is near that mean at once.
    """
    means = observe(1, UNIFORM).expand(256, -1, -1, -1)
    generator = torch.Generator().manual_seed(2)
    noise = lambda: torch.randn(256, 1, SIZE, SIZE, dtype=torch.float64, generator=generator)  # noqa: E731
    sigmas = torch.logspace(1, -2, 20).double()
    found = DDRM()(prior, means, UNIFORM, sigmas, upsample(means, FACTOR), noise).mean(0)
    expected = prior.posterior_mean(means[:1], UNIFORM)[0]
    error = (found - expected).square().mean().sqrt()
    assert error < 0.2 * (upsample(means, FACTOR)[0] - expected).square().mean().sqrt()
    assert error < 0.2 * (prior.mean.view(SIZE, SIZE) - expected).square().mean().sqrt()
    few = torch.logspace(torch.tensor(0.4).log10(), -1.5, 8).double()
    calm = DDRM()(prior, means[:1], UNIFORM, few, upsample(means[:1], FACTOR), lambda: torch.zeros(1, 1, SIZE, SIZE))
    error = (calm[0] - expected).square().mean().sqrt()
    assert error < 0.3 * (upsample(means, FACTOR)[0] - expected).square().mean().sqrt()


def test_levels_of_their_own_and_blocks_of_one_pixel(prior: Any) -> None:
    """Each image alone gives what it gives among others, and comes nearer to the posterior mean."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 1, SIZE, SIZE, dtype=torch.float64, generator=generator)
    observed = prior.sample(2, generator) + 0.1 * noise
    first = torch.tensor([0.1, 0.2]).double()
    sigmas = torch.logspace(0, -1, 6).double()[:, None] * first
    quiet = lambda: torch.zeros(1, 1, SIZE, SIZE).double()  # noqa: E731
    level = torch.tensor(0.1).double()

    def each(noisy: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([prior(image, s) for image, s in zip(noisy.split(1), sigma, strict=True)])

    both = DDRM()(each, observed, level, sigmas, observed, quiet)
    for i in range(2):
        alone = DDRM()(prior, observed[i : i + 1], level, sigmas[:, i], observed[i : i + 1], quiet)
        torch.testing.assert_close(both[i : i + 1], alone)
    gain = torch.linalg.solve(prior.covariance + 0.01 * torch.eye(PIXELS).double(), prior.covariance)
    posterior = (prior.mean + (observed.flatten(1) - prior.mean) @ gain).view_as(observed)
    assert (both - posterior).square().mean() < 0.5 * (observed - posterior).square().mean()


def test_wrong_shares_are_refused() -> None:
    with pytest.raises(SettingError, match=r"eta=1.5"):
        DDRM(eta=1.5)
