import pytest
import torch
from torch import Tensor, nn

from attack_modules.simulation.feature_map import for_speed
from attack_modules.simulation.image_convolution import ImageConvolution
from fl_lightning.models import LeNet5, ResNet9


def image_gradient(layer: nn.Module, images: Tensor, weights: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    (layer(images) * weights).sum().backward()
    return images.grad


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (3, 7)], ids=str)
def test_output_and_image_gradient_are_those_of_the_layer(channels: int, kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 8, kernel, padding=tuple(size // 2 for size in kernel)).requires_grad_(False)
    assert ImageConvolution.fits(layer)
    for shape in ((12, 10), (9, 10), (10, 9)):
        images = torch.rand(2, channels, *shape)
        weights = torch.randn_like(layer(images))
        fast = ImageConvolution(layer)
        assert fast(images).equal(layer(images))
        torch.testing.assert_close(image_gradient(fast, images, weights), image_gradient(layer, images, weights))


def test_it_is_the_fast_way_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    images, weights = torch.rand(1, 3, 8, 8), torch.randn(1, 8, 8, 8)
    expected = image_gradient(layer, images, weights)
    monkeypatch.setattr(torch.nn.functional, "pixel_shuffle", lambda *_: torch.full_like(images, 7.0))
    assert (image_gradient(ImageConvolution(layer), images, weights) == 7.0).all()
    assert image_gradient(layer, images, weights).equal(expected)


def test_autocast_gives_the_gradient_in_the_images_precision() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 5, padding=2).requires_grad_(False)
    images, weights = torch.rand(2, 3, 8, 8), torch.randn(2, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (image_gradient(way, images, weights) for way in (ImageConvolution(layer), layer))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 9, 3, padding=1, groups=3),
        nn.Conv2d(3, 8, 3, padding=2, dilation=2),
        nn.Conv2d(3, 8, 2, padding="same"),
        nn.Linear(3, 8),
    ],
    ids=str,
)
def test_what_it_does_not_fit(layer: nn.Module) -> None:
    assert not ImageConvolution.fits(layer.requires_grad_(False))


def test_layers_that_are_trained_keep_their_gradients() -> None:
    cpu = torch.device("cpu")
    model = for_speed(LeNet5(5, (3, 16, 16)).requires_grad_(False), cpu)
    assert isinstance(model.features[0], ImageConvolution)
    assert isinstance(model.features[3], nn.Conv2d)
    model.requires_grad_(True)
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    trained = for_speed(LeNet5(5, (3, 16, 16)), cpu)
    assert isinstance(trained.features[0], nn.Conv2d)
    assert not any(isinstance(layer, ImageConvolution) for layer in for_speed(ResNet9(5, (3, 32, 32)), cpu).modules())
