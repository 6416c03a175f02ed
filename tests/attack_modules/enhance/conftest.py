"""A prior of which everything is known."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

SIZE, FACTOR = 8, 4
PIXELS = SIZE * SIZE


class GaussianPrior:
    """Images from N(mean, covariance), whose denoiser is linear and whose posterior is known."""

    def __init__(self) -> None:
        place = torch.arange(SIZE, dtype=torch.float64)
        along = torch.exp(-(place[:, None] - place).abs() / 3)  # neighbours are alike
        self.covariance = 0.04 * torch.kron(along, along)
        self.mean = 0.5 + 0.2 * torch.linspace(-1, 1, PIXELS, dtype=torch.float64)
        self.blocks = F.avg_pool2d(torch.eye(PIXELS, dtype=torch.float64).view(PIXELS, 1, SIZE, SIZE), FACTOR)
        self.blocks = self.blocks.flatten(1).T  # H, (blocks, pixels)

    def __call__(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        gain = torch.linalg.solve(self.covariance + sigma**2 * torch.eye(PIXELS), self.covariance)
        return (self.mean + (noisy.flatten(1) - self.mean) @ gain).view_as(noisy)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        white = torch.randn(count, PIXELS, dtype=torch.float64, generator=generator)
        return (self.mean + white @ torch.linalg.cholesky(self.covariance).T).view(-1, 1, SIZE, SIZE)

    def posterior_mean(self, means: Tensor, sigma_y: Tensor) -> Tensor:
        h, variance = self.blocks, sigma_y.expand(means.shape).flatten(1).square()
        noise = torch.diag_embed(variance)
        gain = torch.linalg.solve(h @ self.covariance @ h.T + noise, h @ self.covariance)  # (N, blocks, pixels)
        surprise = means.flatten(1) - h @ self.mean
        return (self.mean + torch.einsum("nb,nbp->np", surprise, gain)).view(-1, 1, SIZE, SIZE)


@pytest.fixture
def prior() -> GaussianPrior:
    return GaussianPrior()
