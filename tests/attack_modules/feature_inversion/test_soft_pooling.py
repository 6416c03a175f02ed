from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attack_modules import FeatureInversion
from attack_modules.feature_inversion.soft_pooling import SoftPooling, soften, softened
from fl_lightning.federation import Federation
from fl_lightning.models import LeNet5

LAYERS = [nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, padding=1), nn.MaxPool2d((2, 3), (1, 2))]


def gradient(layer: nn.Module, maps: Tensor, slope: Tensor) -> Tensor:
    maps = maps.clone().requires_grad_()
    (layer(maps) * slope).sum().backward()
    return maps.grad


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_outputs_are_exact_and_the_gradient_is_shared(layer: nn.MaxPool2d, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 9, 11).contiguous(memory_format=layout)
    slope = torch.rand_like(layer(maps))
    soft = SoftPooling(layer)
    exact = gradient(soft, maps, slope)
    assert soft(maps).equal(layer(maps))
    assert exact.equal(gradient(layer, maps, slope))
    soft.softness = 1e-6
    torch.testing.assert_close(gradient(soft, maps, slope), exact)
    soft.softness = 0.5
    shared = gradient(soft, maps, slope)
    torch.testing.assert_close(shared.sum(), slope.sum())
    assert ((shared != 0).sum((1, 2, 3)) > (exact != 0).sum((1, 2, 3))).all()
    torch.testing.assert_close(gradient(soft, maps[:1], slope[:1]), shared[:1])  # whatever else is in the batch
    assert gradient(soft, maps[0], slope[0]).equal(exact[0])  # a map without a batch stays as it is
    with torch.no_grad():
        assert soft(maps).equal(layer(maps))


def test_shares_fall_linearly_with_the_distance_to_the_maximum() -> None:
    soft = SoftPooling(nn.MaxPool2d(2))
    soft.softness = 2.0
    # outputs 4 and 8: their standard deviation is 2, so inputs have a share up to 4 below the maximum
    maps = torch.tensor([[4.0, 3.0, 8.0, 5.0], [1.0, -9.0, 4.0, 8.0]]).view(1, 1, 2, 4)
    found = gradient(soft, maps, torch.tensor([1.0, 10.0]).view(1, 1, 1, 2))
    expected = torch.tensor([[1, 0.75, 10 / 2.25, 2.5 / 2.25], [0.25, 0, 0, 10 / 2.25]])
    expected[:, :2] /= 2
    torch.testing.assert_close(found.view(2, 4), expected)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_reach_below_the_rounding_of_bf16_leaves_the_exact_gradient(layer: nn.MaxPool2d) -> None:
    torch.manual_seed(0)
    maps = 50 + torch.randn(2, 3, 8, 12).cumsum(3).bfloat16()  # steps of 0.25
    slope = torch.ones_like(layer(maps))
    soft = SoftPooling(layer)
    soft.softness = 1e-3
    shared = gradient(soft, maps, slope)
    highest = gradient(layer, maps, slope) > 0
    assert highest.sum() > 20
    assert (shared[highest] > 0).all()  # those that are equal to them in bf16 have a share as well
    torch.testing.assert_close(shared.float().sum(), slope.float().sum(), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_flat_maps_share_their_gradient_equally_in_any_precision(dtype: torch.dtype) -> None:
    soft = SoftPooling(nn.MaxPool2d(2))
    soft.softness = 0.5
    found = gradient(soft, torch.full((1, 2, 4, 4), 3.0, dtype=dtype), torch.full((1, 2, 2, 2), 4e4, dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.full_like(found, 1e4))


def test_poolings_of_a_model_are_soft_only_meanwhile() -> None:
    torch.manual_seed(0)
    model = soften(LeNet5(5, (3, 16, 16)).requires_grad_(False))
    images = torch.rand(2, 3, 16, 16).requires_grad_()

    def slope() -> Tensor:
        return torch.autograd.grad(model.embed(images).square().sum(), images)[0]

    exact = slope()
    with softened(model, 0.3):
        features = model.embed(images).square().sum()
    assert not torch.autograd.grad(features, images)[0].allclose(exact)
    assert slope().equal(exact)
    kept = nn.ModuleDict({"dilated": nn.MaxPool2d(2, dilation=2), "ceil": nn.MaxPool2d(2, ceil_mode=True)})
    assert not any(map(SoftPooling.fits, kept.values()))


def test_softness_reaches_the_inversion(observe: Callable, attack: Callable) -> None:
    seen = observe(Federation(), num_classes=50)
    exact, soft = (
        attack(FeatureInversion(softness=softness), seen, steps=2).reconstruction().images
        for softness in ((0.0, 0.0), (0.5, 0.5))
    )
    assert not soft.allclose(exact, atol=1e-3)
