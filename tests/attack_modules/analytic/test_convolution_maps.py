import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.analytic.convolution_maps import Convolution, read_maps


def rectified(count: int, shape: tuple[int, int, int]) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, *shape).relu()


def update_of(layer: nn.Conv2d, maps: Tensor, centred: bool) -> Tensor:
    """Sum over images and positions of random errors times patches, with the rounding of float32."""
    patches = F.unfold(maps, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    errors = torch.randn(len(maps), layer.out_channels, patches.shape[2])
    errors = errors - centred * errors.mean((0, 2), keepdim=True)
    return (errors @ patches.transpose(1, 2)).sum(0).view_as(layer.weight)


def test_maps_of_several_images_come_back() -> None:
    maps = rectified(3, (16, 4, 4))
    convolution = Convolution("conv", layer := nn.Conv2d(16, 64, 3, padding=1), (16, 4, 4))
    assert convolution.positions == 16
    assert [convolution.shows(images) for images in (3, 4, 5)] == [True, True, False]  # 80 of 72 directions
    found = read_maps(update_of(layer, maps, centred=False), convolution, 3)
    likeness = found.maps.flatten(1) @ F.normalize(maps.double().flatten(1), dim=1).T
    torch.testing.assert_close(likeness.amax(0), torch.ones(3).double(), rtol=0, atol=1e-4)
    assert likeness.argmax(0).unique().numel() == 3
    assert found.uncertainty < 1e-3
    assert read_maps(torch.randn_like(layer.weight), convolution, 3) is None
    assert read_maps(update_of(layer, rectified(4, (16, 4, 4)), centred=False), convolution, 3) is None


def test_maps_of_few_numbers_come_back_and_single_pixels_are_no_maps() -> None:
    """scipy solves an eigenproblem of fewer numbers than five times the eigenvectors in another way."""
    maps = rectified(8, (16, 2, 2))
    convolution = Convolution("conv", layer := nn.Conv2d(16, 64, 3, padding=1), (16, 2, 2))
    found = read_maps(update_of(layer, maps, centred=False), convolution, 8)
    likeness = found.maps.flatten(1) @ F.normalize(maps.double().flatten(1), dim=1).T
    torch.testing.assert_close(likeness.amax(0), torch.ones(8).double(), rtol=0, atol=1e-4)
    assert not Convolution("squeezed", nn.Conv2d(16, 64, 1), (16, 1, 1)).shows(1)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_single_map_in_front_of_batch_norm_comes_back_as_far_as_it_is_seen(stride: int) -> None:
    """At stride 2, every second pixel of both directions is under the kernel's centre alone."""
    maps, layer = rectified(1, (16, 6, 6)), nn.Conv2d(16, 64, 3, stride, padding=1)
    convolution = Convolution("conv", layer, (16, 6, 6), "norm")
    assert convolution.shows(1)
    assert convolution.shows(2) == (stride == 2)
    found = read_maps(update_of(layer, maps, centred=True), convolution, 1)
    assert len(found.unseen) == stride - 1
    if stride == 2:
        single = torch.zeros(6, 6)
        single[::2, ::2] = 1 / 3
        torch.testing.assert_close(found.unseen[0].abs().float(), single)
    flat = maps.double().flatten(2)
    unseen = found.unseen.flatten(1)
    expected = F.normalize((flat - flat @ unseen.T @ unseen).flatten(1), dim=1)
    torch.testing.assert_close(found.maps.flatten(1), expected, rtol=0, atol=1e-5)


def test_images_of_two_peers_in_front_of_batch_norm_come_back_with_their_peers() -> None:
    """In right proportion, and up to a constant that images of a peer share."""
    maps, layer = rectified(3, (16, 6, 6)), nn.Conv2d(16, 64, 3, 2, padding=1)
    convolution = Convolution("conv", layer, (16, 6, 6), "norm")
    update = sum(update_of(layer, part, centred=True) for part in maps.split([2, 1]))
    found = read_maps(update, convolution, 3)
    unseen = found.unseen.flatten(1)

    def seen(of: Tensor) -> Tensor:
        return (of.flatten(2) - of.flatten(2) @ unseen.T @ unseen).flatten(1)

    likeness = F.normalize(seen(found.maps), dim=1) @ F.normalize(seen(maps.double()), dim=1).T
    best, order = likeness.max(1)
    torch.testing.assert_close(best, torch.ones(3).double(), rtol=0, atol=1e-4)
    first, second = (found.maps[order == image] for image in (0, 1))
    assert found.peers[order == 0] == found.peers[order == 1] != found.peers[order == 2]
    size = seen(first).norm() / seen(maps[:1].double()).norm()
    off = (first - second) / size - (maps[0] - maps[1]).double()
    assert off.norm() < 0.01 * maps[0].norm()
