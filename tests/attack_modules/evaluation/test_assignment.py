import pytest
import torch

from attack_modules.evaluation.assignment import PIXELS_AT_ONCE, match


def images(count: int, side: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_finds_a_three_cycle() -> None:
    originals = images(3)
    reconstructions = originals[[1, 2, 0]] + 0.01  # a swap would not tell a permutation from its inverse
    assert match(reconstructions, originals).tolist() == [2, 0, 1]
    assert torch.equal(reconstructions[match(reconstructions, originals)], originals + 0.01)


def test_minimises_the_total_and_not_each_image_alone() -> None:
    originals = torch.tensor([0.5, 0.6]).view(2, 1, 1, 1)
    reconstructions = torch.tensor([0.55, 0.9]).view(2, 1, 1, 1)  # the first is nearest to both
    assert match(reconstructions, originals).tolist() == [0, 1]


def test_fewer_reconstructions_than_originals() -> None:
    originals = images(5)
    assert match(originals[[3, 1]], originals).tolist() == [-1, 1, -1, 0, -1]


def test_more_reconstructions_than_originals() -> None:
    everything = images(5)
    assert match(everything, everything[[4, 2]]).tolist() == [4, 2]


def test_no_reconstruction_at_all() -> None:
    assert match(images(0), images(2)).tolist() == [-1, -1]


def test_clamps_before_comparing() -> None:
    originals = torch.stack([torch.ones(1, 4, 4), torch.full((1, 4, 4), 0.8)])
    reconstructions = torch.stack([torch.full((1, 4, 4), 0.85), torch.full((1, 4, 4), 9.0)])
    assert match(reconstructions, originals).tolist() == [1, 0]


def test_ignores_a_reconstruction_that_diverged() -> None:
    originals = images(3)
    reconstructions = originals.flip(0)
    reconstructions[1, 0, 0, 0] = torch.nan
    assert match(reconstructions, originals).tolist() == [2, -1, 0]


def test_images_of_more_pixels_than_are_compared_at_once() -> None:
    originals = images(3, side=96)
    assert originals[0].numel() > PIXELS_AT_ONCE
    originals[1] = originals[0]
    originals[1].view(-1)[-1] = 1 - originals[0].view(-1)[-1]  # told apart by the last pixel only
    assert match(originals[[2, 0, 1]], originals).tolist() == [1, 2, 0]


def test_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) cannot be matched to originals of shape \(2, 3, 9, 9\)"):
        match(images(2), images(2, side=9))
