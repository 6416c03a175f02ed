from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from attack_modules import GradientInversion
from attack_modules.gradient_matching.latent_detail import Detail, public_photographs
from attack_modules.gradient_matching.upsampling import nearest_latent, upsampled
from attack_modules.simulation.low_rank import LowRank
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.data import Photographs
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier, LeNet5


class Pixels(ImageClassifier):
    """Its features are the pixels."""

    def __init__(self) -> None:
        super().__init__((0.0,), (1.0,))
        self.features = nn.Flatten()
        self.head = nn.Sequential(nn.Linear(3 * 16 * 16, 5, bias=False))


def test_the_nearest_latent_is_the_one_that_was_upsampled_and_no_other_is_nearer() -> None:
    latent = torch.rand(2, 3, 4, 6)
    torch.testing.assert_close(nearest_latent(upsampled(latent, 4), 4), latent, rtol=0, atol=1e-5)
    images = torch.rand(2, 3, 16, 24)
    nearest = nearest_latent(images, 4).requires_grad_()
    (upsampled(nearest, 4) - images).square().sum().backward()
    assert nearest.grad.abs().max() < 1e-4


def test_the_detail_of_pixels_is_what_is_left_of_the_images_and_whitened_it_is_white() -> None:
    """One image, detail in the first two channels alone and there alike but for the sign: all is known."""
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 - 0.5
    shown = upsampled(nearest_latent(checks[None, None], 4), 4)
    detail = (checks - shown)[0, 0]
    images = 0.5 + torch.stack([checks, -checks, torch.zeros_like(checks)])[None]
    found = Detail.of(Pixels(), images, 4, {"head.0.weight": torch.rand(5, 768)})
    torch.testing.assert_close(found.mean.view(3, 16, 16)[:2, 0, 0], torch.stack([detail.mean(), -detail.mean()]))
    opposite, alike, third = (torch.tensor(v) for v in ([1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    gains = [(found.whitening @ v).norm() / v.norm() for v in (opposite, alike, third)]
    assert gains[1] / gains[0] == pytest.approx((1.01 / 0.01) ** 0.5, rel=1e-3)  # variances 1 and 0, ridge 0.01
    assert gains[2] == pytest.approx(gains[1].item(), rel=1e-3)


def test_whitening_keeps_the_observed_norm_and_factors_stay_factors() -> None:
    model = LeNet5(5, (3, 16, 16))
    update = torch.randn(7, 1024)
    detail = Detail.of(model, public_photographs((3, 16, 16)), 2, {"head.0.weight": update})
    assert detail.whitening.shape == (64, 64)
    torch.testing.assert_close(detail.whiten(update).norm(), update.norm())
    factored = LowRank(torch.randn(7, 1024), 0.5, (torch.randn(3, 7),), (torch.randn(3, 1024),))
    other = torch.randn(4)
    whitened = detail.whitened({"head.0.weight": factored, "head.2.weight": other})
    torch.testing.assert_close(whitened["head.0.weight"].dense(), detail.whiten(factored.dense()), rtol=1e-4, atol=1e-4)
    assert whitened["head.2.weight"] is other


def test_photographs_in_grey_for_grey_victims() -> None:
    grey = public_photographs((1, 16, 16))
    assert grey.shape == (16, 1, 16, 16)
    assert 0 <= grey.min() < grey.max() <= 1


def test_photographs_that_are_the_victims_own_are_refused(tmp_path: Path) -> None:
    data = Photographs(num_clients=2, images_per_client=2, image_size=16)
    rounds = ObservedRounds(Knowledge(), Federation(), data, tmp_path)
    module = GradientInversion(latent_downscale=2, detail=True)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    with pytest.raises(RequirementError, match="these are of `Photographs`"):
        trainer.fit(module, datamodule=rounds)
