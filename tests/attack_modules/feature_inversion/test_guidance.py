from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
import yaml
from PIL import Image
from torch import Tensor

from attack_modules import DiffusionGuidance, FeatureInversion
from attack_modules.attack import Attack
from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.diffusion.trained.denoising_comparison import TV_WEIGHTS, add_noise, psnr, total_variation_denoised
from attack_modules.diffusion.trained.photo_prior import TrainedPrior
from attack_modules.feature_inversion.decoder import FeatureDecoder
from attack_modules.priors import TotalVariation
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import LocalTraining
from fl_lightning.data.images import to_pixels
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.federation import Federation

ROOT = Path(__file__).parents[3]
Observe = Callable[..., ObservedRound]
Run = Callable[..., Attack]
NO_PRIOR = [TotalVariation(weight=0.0)]


class GaussianDenoiser(Denoiser):
    """The exact denoiser of pixels that are normally distributed."""

    sigma_min, sigma_max, multiple = 1e-4, 10.0, 1

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, deviation**2

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        kept = self.variance / (self.variance + sigma.square().view(-1, 1, 1, 1))
        return self.mean + kept * (noisy - self.mean)


def guided(*arguments: Any, **settings: Any) -> Callable[..., FeatureInversion]:
    """Feature inversion with a guidance of these arguments."""
    return partial(FeatureInversion, guidance=DiffusionGuidance(*arguments, **settings))


@pytest.fixture
def seen(observe: Observe) -> ObservedRound:
    return observe(Federation(client=LocalTraining(local_epochs=1)), num_classes=50)


def test_it_ends_where_features_and_denoiser_balance(
    observe: Observe, attack: Run, linear_classifier: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where features are pixels, f, the end of an image that begins with the mean m is known.

    It is f + t (m - f), where the slopes of log |x - f|^2 and of weight |x - D(x)|^2 / (numel sigma^2) cancel.
    """
    monkeypatch.setattr(FeatureDecoder, "fits", lambda *_: False)
    client = LocalTraining(local_epochs=1)
    seen = observe(Federation(model=linear_classifier, client=client), num_classes=50)
    denoiser = GaussianDenoiser(mean=0.5, deviation=0.1)
    module = attack(
        guided(denoiser, weight=20.0, sigma_start=0.2, sigma_per_error=1e3, denoise_every=1)(
            priors=NO_PRIOR, lr=0.05, resimulations=0
        ),
        seen,
        steps=200,
    )
    pixels = module.features.view_as(module.images)
    shrinkage = 1 - 0.1**2 / (0.1**2 + 0.2**2)  # x - D(x) = shrinkage * (x - mean); sigma stays at its start
    variance = (pixels - 0.5).square().mean((1, 2, 3), keepdim=True)
    pull = 20.0 * shrinkage * variance / 0.2**2  # 1 / (t (1 - t)) at the end
    assert pull.min() > 4.5  # else the features win
    expected = pixels + (1 + (1 - 4 / pull).sqrt()) / 2 * (0.5 - pixels)
    torch.testing.assert_close(module.reconstruction().images, expected, rtol=0, atol=5e-3)


def test_noise_levels_follow_the_feature_error_of_each_image(seen: ObservedRound, attack: Run) -> None:
    module = attack(guided(GaussianDenoiser(0.5, 0.2), sigma_per_error=0.5)(lr=0.1), seen, steps=40)
    with torch.no_grad():
        errors = module.feature_error(module.best, module.features)
    guidance = module.guidance
    torch.testing.assert_close(guidance.errors, errors, rtol=0.2, atol=1e-6)
    torch.testing.assert_close(guidance.sigma, (0.5 * guidance.errors.sqrt()).clamp(1e-4, 0.1))
    assert guidance.errors.max() < 0.1


def test_without_weight_it_is_feature_inversion(seen: ObservedRound, attack: Run) -> None:
    plain = attack(FeatureInversion(lr=0.1), seen, steps=8)
    module = attack(guided(GaussianDenoiser(0.5, 0.2), weight=0.0, denoise_every=3)(lr=0.1), seen, steps=8)
    torch.testing.assert_close(module.images, plain.images)


def test_a_file_names_the_denoiser_which_checkpoints_leave_out(
    tmp_path: Path, seen: ObservedRound, attack: Run
) -> None:
    TrainedPrior([8], layers=1).save(tmp_path / "prior.safetensors")
    module = attack(guided(tmp_path / "prior.safetensors", denoise_every=2)(chunk_size=3), seen, steps=5)
    assert module.reconstruction().images.isfinite().all()
    assert not any("unet" in name for name in module.state_dict())
    assert "Guidance: TrainedPrior" in module.introduction()


def test_what_cannot_be_is_refused(tmp_path: Path, seen: ObservedRound, attack: Run) -> None:
    with pytest.raises(MissingFile, match="no prior"):
        DiffusionGuidance(tmp_path / "nothing.safetensors")
    with pytest.raises(SettingError, match="denoise_every=0"):
        DiffusionGuidance(GaussianDenoiser(0.5, 0.1), denoise_every=0)
    coarse = GaussianDenoiser(0.5, 0.1)
    coarse.multiple = 32
    with pytest.raises(RequirementError, match=r"multiples of 32 pixels, but they are 3 x 16 x 16"):
        attack(guided(coarse)(), seen, steps=1)


@pytest.mark.parametrize("name", ["guided", "guided_resnet"])
def test_the_configurations_name_the_shipped_prior_which_beats_total_variation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(Path(f"configs/{name}.yaml").read_text())["model"]
    guidance = settings["init_args"]["guidance"]
    assert guidance["class_path"] == "DiffusionGuidance"
    denoiser = DiffusionGuidance(**guidance["init_args"]).denoiser
    photograph = to_pixels(Image.fromarray(skimage.data.chelsea()), 128, 3)[None] / 255  # not trained on
    noisy = add_noise(photograph, 0.1, seed=0)
    total_variation = max(psnr(total_variation_denoised(noisy, weight * 0.1), photograph) for weight in TV_WEIGHTS)
    assert psnr(denoiser(noisy, torch.tensor(0.1)), photograph) > total_variation + 1
