import torch

from attack_modules.feature_inversion.dead_leaves import dead_leaves


def test_the_same_images_for_the_same_seed_and_grey_ones_for_one_channel() -> None:
    images = dead_leaves(2, (3, 16, 24))
    assert images.shape == (2, 3, 16, 24)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, dead_leaves(2, (3, 16, 24)))
    assert not torch.equal(images, dead_leaves(2, (3, 16, 24), seed=1))
    assert dead_leaves(1, (1, 8, 8)).shape == (1, 1, 8, 8)


def test_they_look_alike_at_half_the_size() -> None:
    """A photograph's amplitudes fall as 1 / frequency, so that differences of neighbours keep their variance."""
    images = dead_leaves(32, (3, 64, 64))
    halved = torch.nn.functional.avg_pool2d(images, 2)
    variances = [scale.diff(dim=3).var().item() for scale in (images, halved)]
    assert 0.7 < variances[1] / variances[0] < 1.6
    noise = torch.rand_like(images)
    halved_noise = torch.nn.functional.avg_pool2d(noise, 2)
    assert halved_noise.diff(dim=3).var() / noise.diff(dim=3).var() < 0.3


def test_colours_are_near_grey() -> None:
    images = dead_leaves(16, (3, 32, 32))
    correlation = torch.corrcoef(images.transpose(0, 1).flatten(1))
    assert correlation[0, 1] > 0.5
