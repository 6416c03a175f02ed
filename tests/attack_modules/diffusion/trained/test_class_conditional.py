"""The small class-conditional model: preconditioning, guidance, its file, and its training."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from attack_modules.diffusion.conditional import ddim, explicit_timesteps
from attack_modules.diffusion.trained.class_conditional import (
    SIGMA_DATA,
    SIGMA_MAX,
    SIGMA_MIN,
    ClassConditionalDiffusion,
    SmallConditional,
    TrainedConditional,
)
from cli import main
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.storage import StorageError

ROOT = Path(__file__).parents[4]


def untrained(**settings: object) -> SmallConditional:
    torch.manual_seed(0)
    return SmallConditional([8, 16], 1, image_size=16, **settings).eval().requires_grad_(False)


def changed(model: SmallConditional) -> SmallConditional:
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    return model


def test_before_training_it_is_the_best_pixelwise_linear_denoiser() -> None:
    model, x, sigma = untrained(), torch.randn(3, 3, 16, 16), torch.tensor([0.02, 0.5, 40.0])
    expected = x * (SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2))[:, None, None, None]
    torch.testing.assert_close(model.denoise(x, sigma, torch.tensor([0, 9, 10])), expected)


def test_sampling_pixels_that_are_gaussian() -> None:
    """The untrained model is exact for independent pixels of variance 1/4, so that samples must have it."""
    model = untrained()
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sample = ddim(model, noise, torch.zeros(4, dtype=torch.long), explicit_timesteps(30, 1000)).latents
    assert sample.std().item() == pytest.approx(0.5, rel=0.08)
    assert model.decode(sample).mean().item() == pytest.approx(0.5, abs=0.02)


def test_timesteps_have_the_noise_levels_of_edm() -> None:
    sigmas = (1 / untrained().alphas - 1).sqrt()
    assert sigmas[0].item() == pytest.approx(SIGMA_MIN)
    assert sigmas[-1].item() == pytest.approx(SIGMA_MAX)
    middle = ((SIGMA_MIN ** (1 / 7) * 499 + SIGMA_MAX ** (1 / 7) * 500) / 999) ** 7
    assert sigmas[500].item() == pytest.approx(middle, rel=1e-6)


def test_guidance_leads_away_from_no_class() -> None:
    model = changed(untrained(guidance=3.0))
    x, labels, alpha = torch.randn(2, 3, 16, 16), torch.tensor([1, 7]), float(model.alphas[600])
    sigma = (1 / alpha - 1) ** 0.5
    given = model.denoise(x / alpha**0.5, torch.full((2,), sigma), labels)
    free = model.denoise(x / alpha**0.5, torch.full((2,), sigma), torch.tensor([10, 10]))
    clean = free + 3 * (given - free)
    noise = model.noise(x, 600, labels)
    torch.testing.assert_close(alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise, x, rtol=1e-4, atol=1e-4)
    model.guidance = 1.0
    torch.testing.assert_close(model.noise(x, 600, labels), (x / alpha**0.5 - given) / sigma, rtol=1e-4, atol=1e-4)


def test_a_file_gives_the_model_back(tmp_path: Path) -> None:
    model = changed(untrained(class_names=["cat", "dog"], guidance=3.0))
    model.save(tmp_path / "model.safetensors")
    loaded = TrainedConditional(tmp_path / "model.safetensors", guidance=3.0)
    assert [known.name for known in loaded.classes] == ["cat", "dog"]
    x, labels = torch.randn(1, 3, 16, 16), torch.tensor([1])
    torch.testing.assert_close(loaded.noise(x, 300, labels), model.noise(x, 300, labels), rtol=1e-2, atol=1e-2)
    with pytest.raises(MissingFile, match=r"no diffusion model at .*gone.*python cli.py fit --config configs/cifar"):
        TrainedConditional(tmp_path / "gone.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(StorageError, match="cannot be read as a class-conditional diffusion model"):
        TrainedConditional(tmp_path / "model.safetensors")


def test_settings_that_cannot_be() -> None:
    with pytest.raises(SettingError, match="channels that are multiples of 8"):
        SmallConditional([12])
    with pytest.raises(SettingError, match=r"image_size divisible by 2\^len\(channels\)"):
        SmallConditional([8, 8, 8], image_size=12)
    with pytest.raises(SettingError, match="scale >= 1"):
        SmallConditional([8], guidance=0.0)
    with pytest.raises(SettingError, match="dropout in"):
        ClassConditionalDiffusion(SmallConditional([8]), dropout=1.0)


def test_training_teaches_the_classes(tmp_path: Path) -> None:
    """Two classes, black and white: after training, the class decides what noise becomes."""
    torch.manual_seed(0)
    model = SmallConditional([8], 1, image_size=8, class_names=["black", "white"])
    module = ClassConditionalDiffusion(model, lr=5e-3, warmup=5, decay=0.9, export=tmp_path / "model.safetensors")
    labels = torch.arange(32) % 2
    images = (0.1 + 0.8 * labels[:, None, None, None]).expand(-1, 3, 8, 8).contiguous()
    trainer = Trainer(
        max_epochs=60, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, DataLoader([(images, labels)], batch_size=None))
    trained = TrainedConditional(tmp_path / "model.safetensors", guidance=1.0)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    black, white = trained.decode(ddim(trained, noise, torch.tensor([0, 1]), explicit_timesteps(8, 1000)).latents)
    assert black.mean() < 0.3 < 0.7 < white.mean()


def test_training_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attack_modules.analytic.typical_head import pink_noise
    from attack_modules.panels import save_png

    for split in ("train", "test"):
        for index, image in enumerate(pink_noise(6, (3, 32, 32))):
            save_png(image, tmp_path / "cifar" / split / ("cat", "dog")[index % 2] / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(ROOT / "configs/cifar10_diffusion.yaml"), "--data.root", str(tmp_path / "cifar"),
          "--model.model.channels", "[8]", "--model.model.layers", "1", "--trainer.max_epochs", "1",
          "--trainer.accelerator", "cpu"])  # fmt: skip
    run = Path("runs/cifar10_diffusion/version_0")
    assert TrainedConditional(run / "diffusion.safetensors").image_size == 32
    assert list((run / "checkpoints").glob("*.ckpt"))
