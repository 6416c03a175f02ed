"""The mixture of Gaussians: its transform, Tweedie's formula, sampling, fitting, its file."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from attack_modules.diffusion.conditional import ddim, explicit_timesteps
from attack_modules.diffusion.mixture import FittedMixture, GaussianMixture, MixtureFit
from attack_modules.labels import pink_noise
from cli import main
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.storage import StorageError

ROOT = Path(__file__).parents[3]


def mixture(**settings: object) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    model = GaussianMixture(3, 4, ["cat", "dog"], **settings)
    model.means.copy_(torch.randn(model.means.shape, generator=generator))
    model.variances.copy_(0.05 + torch.rand(model.means.shape, generator=generator))
    model.weights.copy_(torch.rand(2, 3, generator=generator).softmax(1))
    return model


def test_the_transform_is_orthonormal() -> None:
    model, images = GaussianMixture(1, 8), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = model.encode(images)
    torch.testing.assert_close(model.decode(latents), images)
    torch.testing.assert_close(latents.square().sum(), (2 * images - 1).square().sum())
    grey = model.encode(torch.full((1, 3, 8, 8), 0.75))[0]
    assert grey[0, 0, 0].item() == pytest.approx(0.5 * (3 * 64) ** 0.5)
    grey[0, 0, 0] = 0
    assert grey.abs().max() < 1e-5


def test_denoising_is_tweedies_formula() -> None:
    model = mixture().double()
    noisy = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    components = model.of_class(1)
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(components[2]),
        torch.distributions.Independent(torch.distributions.Normal(components[0], (components[1] + 0.3).sqrt()), 1),
    )
    log_likelihood = model.posterior(noisy, 0.3, components).log_likelihood
    torch.testing.assert_close(log_likelihood, density.log_prob(noisy))
    (score,) = torch.autograd.grad(log_likelihood.sum(), noisy)
    torch.testing.assert_close(model.denoise(noisy, 0.3, components), noisy + 0.3 * score)


def test_guidance_leads_away_from_the_other_classes() -> None:
    model, labels = mixture(guidance=1.0), torch.tensor([1, 0, 1])
    latents, alpha = torch.randn(3, 3, 4, 4), float(mixture().alphas[500])
    noisy = latents.flatten(1) / alpha**0.5
    given = torch.cat(
        [model.denoise(noisy[[i]], 1 / alpha - 1, model.of_class(c))
         for i, c in enumerate(labels.tolist())]
    )  # fmt: skip
    predicted = ((noisy - given) / (1 / alpha - 1) ** 0.5).view_as(latents)
    torch.testing.assert_close(model.noise(latents, 500, labels), predicted, rtol=1e-4, atol=1e-4)
    away = mixture(guidance=2.0).noise(latents, 500, labels)
    assert not torch.allclose(away, predicted, atol=1e-2)


def test_samples_have_the_mixtures_moments() -> None:
    model = mixture(guidance=1.0)
    noise = torch.randn(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sample = ddim(model, noise, torch.zeros(2000, dtype=torch.long), explicit_timesteps(60, 1000)).latents.flatten(1)
    mean = model.weights[0] @ model.means[0]
    second = model.weights[0] @ (model.variances[0] + model.means[0].square())
    assert (sample.mean(0) - mean).abs().max() < 0.15
    assert (sample.square().mean(0) / second).mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("side", "channels"), [(16, 3), (4, 3), (4, 1)])
def test_the_noise_of_reconstructions_is_told(side: int, channels: int) -> None:
    """Samples of the mixture, reduced to block means, plus noise of a known variance."""
    generator = torch.Generator().manual_seed(0)
    model = GaussianMixture(1, 16, ["cat"])
    frequency = torch.arange(16)[:, None] + torch.arange(16) + 1.0
    model.variances.copy_((4 / frequency**2).expand(3, 16, 16).reshape(1, 1, -1))  # as of natural images
    latents = model.variances[0, 0].sqrt() * torch.randn(200, 768, generator=generator)
    images = model.decode(latents.view(-1, 3, 16, 16)).mean(1, keepdim=channels == 1)
    images = images if channels == 1 else model.decode(latents.view(-1, 3, 16, 16))
    means = F.adaptive_avg_pool2d(images, side)
    noisy = means + 0.1 * torch.randn(means.shape, generator=generator)
    found = model.noise_variance(noisy, torch.zeros(200, dtype=torch.long))
    assert found.median().item() == pytest.approx(0.01, rel=0.35)


def fit(images: Tensor, labels: Tensor, path: Path, epochs: int) -> GaussianMixture:
    model = GaussianMixture(4, 8, ["cat", "dog"])
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    batches = [(images[i::2], labels[i::2]) for i in (0, 1)]
    trainer.fit(MixtureFit(model, prior_count=0.1, export=path), DataLoader(batches, batch_size=None))
    return model


def test_maximisation_keeps_each_class_mean_and_the_file_gives_the_mixture_back(tmp_path: Path) -> None:
    labels = torch.arange(40) % 2
    images = 0.5 * pink_noise(40, (3, 8, 8)) + 0.4 * labels[:, None, None, None]
    model = fit(images, labels, tmp_path / "m.safetensors", epochs=3)
    both = model.encode(torch.cat([images, images.flip(3)])).flatten(1)
    for label in (0, 1):
        found = model.weights[label] @ model.means[label]
        torch.testing.assert_close(found, both[labels.repeat(2) == label].mean(0), atol=1e-4, rtol=1e-3)
    loaded = FittedMixture(tmp_path / "m.safetensors")
    assert [known.name for known in loaded.classes] == ["cat", "dog"]
    torch.testing.assert_close(loaded.means, model.means, atol=0.01, rtol=1e-3)


def test_likelihood_grows(tmp_path: Path) -> None:
    images, labels = pink_noise(60, (3, 8, 8)), torch.arange(60) % 2
    likelihoods = []
    for epochs in (1, 2, 5):
        model = fit(images, labels, tmp_path / "m.safetensors", epochs)
        coefficients = model.encode(images).flatten(1)
        total = 0.0
        for c in (0, 1):
            components = model.of_class(c)
            total += model.posterior(coefficients[labels == c], 0.0, components).log_likelihood.sum().item()
        likelihoods.append(total)
    assert likelihoods == sorted(likelihoods)


def test_fitting_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attack_modules.panels import save_png

    for split in ("train", "test"):
        for index, image in enumerate(pink_noise(8, (3, 32, 32))):
            save_png(image, tmp_path / "cifar" / split / ("cat", "dog")[index % 2] / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(ROOT / "configs/cifar10_mixture.yaml"), "--data.root", str(tmp_path / "cifar"),
          "--model.model.components", "2", "--model.model.class_names", '["cat", "dog"]', "--trainer.max_epochs", "2",
          "--trainer.accelerator", "cpu"])  # fmt: skip
    assert FittedMixture(Path("runs/cifar10_mixture/version_0/mixture.safetensors")).components == 2


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="guidance >= 1"):
        GaussianMixture(guidance=0.0)
    with pytest.raises(MissingFile, match=r"no mixture at .*python cli.py fit --config configs/cifar10_mixture.yaml"):
        FittedMixture(tmp_path / "gone.safetensors")
    (tmp_path / "foreign.safetensors").write_bytes(b"no mixture")
    with pytest.raises(StorageError, match="cannot be read as a mixture"):
        FittedMixture(tmp_path / "foreign.safetensors")
    with pytest.raises(SettingError, match="Class 0 has 1 images, but 4 components"):
        fit(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 1]), tmp_path / "m.safetensors", 1)
