"""Independent noise in an update, recognised by its singular values (Marchenko and Pastur 1967)."""

import torch
from torch import Tensor

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which the spectrum is compared with that of noise."""
TOLERANCE = 0.015
"""Largest deviation of a quantile, as a share of the median. Measured for 512 rows: at most 0.008 under Gaussian noise,
0.18 and more under pruning and quantisation, whose singular values would be mistaken for hundreds of images."""
SCATTER = 1.5
"""The quantiles of a small matrix scatter by this over its smaller dimension."""
FLUCTUATION = 2 / 3
"""The largest singular value of H x D noise exceeds the edge of its spectrum by up to `min(H, D) ** -FLUCTUATION` of it
(Tracy and Widom)."""


def noise_floor(singular: Tensor, shape: tuple[int, int]) -> tuple[float, int] | None:
    """Standard deviation of independent noise in a matrix, and the number of singular values above it.

    The singular values of a noise matrix (H, D) fill the interval `sigma (sqrt(D) +- sqrt(H))` with a known density.
    Those below it are fewer than H where units are inactive, so noise in every entry also shows in the rank.

    Args:
        singular: (r,) falling singular values.
        shape: (H, D) of the matrix.

    Returns:
        Sigma and the count, which is a lower bound of the rank of what the noise was added to; None where the spectrum
        is not that of noise.
    """
    small, large = sorted(shape)
    if len(singular) < small:
        return None
    expected = spectrum_quantiles(small / large) * large**0.5
    edge = (large**0.5 + small**0.5) * (1 + small**-FLUCTUATION)
    above, previous = 0, -1
    while above != previous and above < small // 2:
        seen = singular[above:].quantile(torch.tensor(QUANTILES, dtype=singular.dtype))
        sigma = (seen / expected).median().item()
        previous, above = above, int((singular > sigma * edge).sum())
    deviation = (seen / sigma - expected).abs().max() / expected.median()
    if deviation > max(TOLERANCE, SCATTER / small):
        return None
    return sigma, above


def spectrum_quantiles(ratio: float, points: int = 20001) -> Tensor:
    """Quantiles (`QUANTILES`) of the singular values of an (H, D) matrix of unit noise over sqrt(D).

    Args:
        ratio: H / D, in (0, 1].
        points: of the integration.
    """
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    angle = torch.linspace(0, torch.pi, points, dtype=torch.float64)
    square = (low + high) / 2 - (high - low) / 2 * angle.cos()  # denser at both ends, where the density is steep
    density = ((high - square) * (square - low)).clamp_min(0).sqrt() / square.clamp_min(1e-12) * angle.sin()
    share = torch.cumulative_trapezoid(density, angle)
    at = torch.searchsorted(share, share[-1] * torch.tensor(QUANTILES, dtype=torch.float64))
    return square[1:][at].sqrt()
