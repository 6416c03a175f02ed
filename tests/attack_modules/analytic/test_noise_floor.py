import pytest
import torch
from torch import Tensor

from attack_modules.analytic.noise_floor import noise_floor


def spectrum(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix)


@pytest.mark.parametrize("shape", [(60, 400), (200, 2000), (120, 120)])
def test_noise_and_the_images_above_it_are_found(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    signal = 100 * torch.randn(shape[0], 5, dtype=torch.float64) @ torch.randn(5, shape[1], dtype=torch.float64)
    found = noise_floor(spectrum(signal + 0.7 * torch.randn(shape, dtype=torch.float64)), shape)
    assert found is not None
    assert found[0] == pytest.approx(0.7, rel=0.05)
    assert found[1] == 5


def test_what_is_no_independent_noise_is_not_taken_for_it() -> None:
    torch.manual_seed(0)
    shape = (100, 800)
    noise = torch.randn(shape, dtype=torch.float64)
    images = torch.rand(100, 20, dtype=torch.float64) @ torch.rand(20, 800, dtype=torch.float64)
    for matrix in (
        images[:, :80],  # of less than full rank
        torch.where(images > images.flatten().quantile(0.9), images, 0.0),
        (images / images.max() * 7).round(),
        noise * torch.logspace(0, 2, 100, dtype=torch.float64)[:, None],  # rows of unequal noise
    ):
        assert noise_floor(spectrum(matrix), shape) is None
