from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attack_modules.priors import ChromaTotalVariation, TotalVariation, annealed, rgb_to_ycbcr, total_variation


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    # down: 0.5 and 0.5, right: 1 and 0
    torch.testing.assert_close(TotalVariation()(image), torch.tensor([0.5 + 0.5]))


def test_flat_images_cost_nothing_and_each_image_has_its_own() -> None:
    images = torch.stack([torch.full((3, 8, 8), 0.3), torch.rand(3, 8, 8)])
    for prior in (TotalVariation(), ChromaTotalVariation()):
        flat, noise = prior(images)
        assert flat.abs() < 1e-6
        assert noise > 0.1


def test_chroma_weighs_four_times_luma() -> None:
    grey = torch.zeros(1, 3, 4, 4)
    grey[..., 2:] = 0.5  # a step in luma only
    torch.testing.assert_close(ChromaTotalVariation(chroma=4)(grey), ChromaTotalVariation(chroma=1)(grey))
    blue = torch.zeros(1, 3, 4, 4)
    blue[:, 2, :, 2:] = 0.5
    ycc = rgb_to_ycbcr(blue)
    slope = ycc.diff(dim=3).abs().mean((2, 3))[0]
    torch.testing.assert_close(ChromaTotalVariation(chroma=4)(blue)[0], (slope[0] + 4 * slope[1] + 4 * slope[2]) / 3)
    torch.testing.assert_close(ChromaTotalVariation()(blue[:, :1]), TotalVariation()(blue[:, :1]))  # grey images


def test_ycbcr_of_white_and_blue() -> None:
    white = rgb_to_ycbcr(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(white, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    blue = rgb_to_ycbcr(torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(blue, torch.tensor([0.114, 0.5, -0.081312]))


def test_the_slope_of_total_variation_is_that_of_its_differences() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    images[:, :, 2] = images[:, :, 1]  # equal neighbours have none
    weights = torch.rand(2, 3, dtype=torch.float64)

    def slope(variation: Callable[[Tensor], Tensor], layout: torch.memory_format) -> Tensor:
        leaf = images.clone(memory_format=layout).requires_grad_()
        return torch.autograd.grad((variation(leaf) * weights).sum(), leaf)[0]

    def composed(images: Tensor) -> Tensor:
        return images.diff(dim=2).abs().mean((2, 3)) + images.diff(dim=3).abs().mean((2, 3))

    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(slope(total_variation, layout), slope(composed, layout))


def test_annealing_is_geometric() -> None:
    assert [annealed((1.0, 0.01), step, 3) for step in range(3)] == pytest.approx([1.0, 0.1, 0.01])
    assert annealed((2.0, 2.0), 0, 1) == 2.0


def test_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        TotalVariation(-1.0)
