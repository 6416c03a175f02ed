"""USRNet: unfolded super-resolution with a known blur kernel (Zhang et al. 2020, arXiv 2003.10428)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ITERATIONS = 8
"""Number of unfolded iterations, each a data step and a prior step."""


class ResidualBlock(nn.Module):
    """Residual block: two convolutions without biases, and a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res(x)


class ResUNet(nn.Module):
    """USRNet's prior step, a denoiser: (N, 4, H, W) estimate and noise map -> (N, 3, H, W)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def down(channels: int) -> nn.Sequential:
            halving = nn.Conv2d(channels, 2 * channels, 2, stride=2, bias=False)
            return nn.Sequential(ResidualBlock(channels), ResidualBlock(channels), halving)

        def up(channels: int) -> nn.Sequential:
            doubling = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2, bias=False)
            return nn.Sequential(doubling, ResidualBlock(channels), ResidualBlock(channels))

        self.m_head = nn.Conv2d(4, width, 3, padding=1, bias=False)
        self.m_down1, self.m_down2, self.m_down3 = down(width), down(2 * width), down(4 * width)
        self.m_body = nn.Sequential(ResidualBlock(8 * width), ResidualBlock(8 * width))
        self.m_up3, self.m_up2, self.m_up1 = up(4 * width), up(2 * width), up(width)
        self.m_tail = nn.Conv2d(width, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x1 = self.m_head(F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate"))
        x2 = self.m_down1(x1)
        x3 = self.m_down2(x2)
        x4 = self.m_down3(x3)
        x = self.m_up3(self.m_body(x4) + x4)
        x = self.m_up1(self.m_up2(x + x3) + x2)
        return self.m_tail(x + x1)[..., :height, :width]


class HyperParameters(nn.Module):
    """USRNet's alpha and beta for every iteration: (N, 2) noise level and factor -> (N, 16), positive."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(2, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 2 * ITERATIONS, 1),
            nn.Softplus(),
        )

    def forward(self, told: Tensor) -> Tensor:
        return self.mlp(told[:, :, None, None])[:, :, 0, 0] + 1e-6


class USRNet(nn.Module):
    """Unfolded super-resolution with a known blur kernel (Zhang et al. 2020, arXiv 2003.10428)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.p = ResUNet(width)
        self.h = HyperParameters()

    def forward(self, small: Tensor, kernel: Tensor, factor: int, noise: float) -> Tensor:
        """Super-resolve `small = (image * kernel)[every factor-th pixel] + noise`.

        Args:
            small: (N, 3, h, w) in [0, 1].
            kernel: (k, k) blur kernel at the resolution of the result, with sum 1.
            factor: upsampling factor of height and width.
            noise: noise level of `small`: standard deviation, for pixels in [0, 1].

        Returns:
            (N, 3, factor h, factor w), not clamped.
        """
        told = small.new_tensor([noise, factor]).expand(len(small), 2)
        alphas, betas = self.h(told)[:, :, None, None, None].chunk(2, dim=1)  # (N, 8, 1, 1, 1)
        estimate = F.interpolate(small, scale_factor=factor, mode="nearest")
        for iteration in range(ITERATIONS):
            estimate = data_step(estimate, small, kernel, factor, alphas[:, iteration])
            noise_map = betas[:, iteration].expand(-1, 1, *estimate.shape[-2:])
            estimate = self.p(torch.cat([estimate, noise_map], dim=1))
        return estimate


def data_step(estimate: Tensor, small: Tensor, kernel: Tensor, factor: int, alpha: Tensor) -> Tensor:
    """Minimise `|(x * kernel)[every factor-th pixel] - small|^2 + alpha |x - estimate|^2` over x.

    The minimiser has a closed form by FFT under circular boundary conditions (arXiv 2003.10428, equation 7).

    Args:
        estimate: (N, C, factor h, factor w).
        small: (N, C, h, w).
        kernel: (k, k) blur kernel.
        factor: subsampling factor.
        alpha: (N, 1, 1, 1) > 0.

    Returns:
        (N, C, factor h, factor w).
    """
    shape = estimate.shape[-2:]
    placed = F.pad(kernel, (0, shape[1] - kernel.shape[1], 0, shape[0] - kernel.shape[0]))
    blur = torch.fft.fft2(placed.roll((-(kernel.shape[0] // 2), -(kernel.shape[1] // 2)), (0, 1)))
    spread = torch.zeros_like(estimate)
    spread[..., ::factor, ::factor] = small
    right = blur.conj() * torch.fft.fft2(spread) + torch.fft.fft2(alpha * estimate)

    def folded(spectrum: Tensor) -> Tensor:
        """Average the frequencies that alias to the same frequency of the small image."""
        h, w = small.shape[-2:]
        return spectrum.unflatten(-1, (factor, w)).unflatten(-3, (factor, h)).mean((-4, -2))

    aliased = folded(blur * right) / (folded(blur.abs().square()) + alpha)
    return torch.fft.ifft2((right - blur.conj() * aliased.tile(1, 1, factor, factor)) / alpha).real
