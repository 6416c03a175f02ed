"""Images from maps behind max pooling, and maps in front of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attack_modules.analytic.pooled_maps import READ, Pooled, maps_before_pooling
from attack_modules.feature_inversion.controls import mean_colour_psnr, mean_psnr
from attack_modules.feature_inversion.pooling_positions import (
    Gradient,
    PhotographPrior,
    PoolingPositions,
    _Equations,
)
from fl_lightning.models import ImageClassifier


class Pooling(ImageClassifier):
    def __init__(self) -> None:
        super().__init__((0.5,), (0.25,))
        self.features = nn.Sequential(nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2))


@pytest.mark.parametrize("pooling", [nn.MaxPool2d(3, 2), None])
def test_the_update_shows_the_maps_in_front_of_max_pooling(pooling: nn.MaxPool2d | None) -> None:
    torch.manual_seed(0)
    of = Pooled(nn.Conv2d(8, 256, 3, padding=1), pooling)
    maps = torch.randn(2, 8, 7, 7).relu()
    behind = of.layer(maps).relu()
    behind = (pooling(behind) if pooling else behind).detach()
    errors = torch.randn(behind.shape)
    outputs = of.layer(maps).relu()
    ((pooling(outputs) if pooling else outputs) * errors).sum().backward()
    assert of.reads(4, 49) and not of.reads(50, 49)
    assert of.reads(16, 49) == (pooling is None)  # three equations an unknown: positions would stay wrong

    found = maps_before_pooling(of, behind, errors, of.layer.weight.grad, (7, 7))
    off = (found.maps - maps).norm() / maps.norm()
    assert (
        found.misfit < 0.25 * READ and off < 0.01
    )  # outputs below `POSITIVE` are taken as closed, though some are not

    wrong = maps_before_pooling(of, behind, errors.flip(0), of.layer.weight.grad, (7, 7))
    assert wrong.misfit > READ


def test_images_come_out_of_the_map_behind_max_pooling() -> None:
    torch.manual_seed(0)
    model = Pooling()
    positions = PoolingPositions(model, model.features[0], model.features[2], (3, 32, 32))
    prior = positions.prior
    images = (prior.mean + prior.images(torch.randn(1, 3, 32, 32))).clamp(0, 1)
    maps = model.embed(images)
    errors = torch.randn(1, 24, 7, 7)
    (maps * errors.flatten(1)).sum().backward()
    weight = model.features[0].weight.grad
    maps = maps.detach()

    for gradient in (None, Gradient(weight, errors)):
        assert mean_psnr(positions(maps, gradient), images) > mean_colour_psnr(images) + 2

    with torch.no_grad():  # given the true positions, the gradient tells what the map leaves open
        _, true = F.max_pool2d(model.features[0](model.normalise(images)), 3, 2, return_indices=True)
        target, solved = maps.view(1, 24, -1), []
        for counts in (False, True):
            waves = torch.zeros_like(images)
            for _ in range(20):
                equations = _Equations(positions, true.flatten(2), 1e6 * (target > 0))
                if counts:
                    equations.count(weight, errors.flatten(2) * (target > 0), waves)
                    equations.rows = torch.full_like(equations.rows, 1e4)  # all positions are right
                waves = equations.solved(target, waves)
            solved.append(mean_psnr(prior.mean + prior.images(waves), images))
    assert solved[1] > solved[0] + 1


def test_waves_are_the_adjoint_of_images() -> None:
    prior = PhotographPrior((3, 16, 24))
    torch.manual_seed(0)
    waves, images = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24)
    assert F.mse_loss((prior.images(waves) * images).sum(), (waves * prior.waves(images)).sum()) < 1e-4
