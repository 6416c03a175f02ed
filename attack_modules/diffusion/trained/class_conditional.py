"""Small class-conditional diffusion model in pixel space, trainable on one CPU core in about two hours."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from attack_modules.diffusion.classes import CIFAR10, ImageClass
from attack_modules.diffusion.conditional import ConditionalModel
from attack_modules.diffusion.schedules import karras_sigmas
from attack_modules.diffusion.trained.averaged_module import AveragedModule
from attack_modules.diffusion.trained.edm import denoised, loss_weight, unet_of_squares
from attack_modules.diffusion.trained.model_file import opened_model, save_model
from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import SettingError, positive

SHIPPED = CHECKPOINTS / "cifar10_diffusion.safetensors"

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.02, 40.0, 0.5
"""Lowest and highest noise level, and standard deviation of the pixels, for images in [-1, 1]."""
GUIDANCE = 8.0
"""Default scale of classifier-free guidance; 1 for none."""


class SmallConditional(ConditionalModel):
    """Convolutional U-Net on 2x2 pixel blocks with the preconditioning of EDM (arXiv 2206.00364, table 1).

    The latents are the images themselves, in [-1, 1].

    Args:
        channels: channels of each U-Net level, finest first, multiples of 8; each level halves height and width.
        layers: residual blocks per level.
        image_size: height and width of the images, a multiple of 2^len(channels).
        class_names: class names in label order.
        guidance: scale of classifier-free guidance, >= 1; 1 for none.

    Raises:
        SettingError: an argument is out of range.
    """

    def __init__(
        self,
        channels: list[int] = [32, 64, 128],  # noqa: B006 - never mutated
        layers: int = 1,
        image_size: int = 32,
        class_names: list[str] = list(CIFAR10),  # noqa: B006
        guidance: float = GUIDANCE,
    ) -> None:
        super().__init__()
        if layers < 1 or not channels or any(c < 8 or c % 8 for c in channels) or image_size % 2 ** len(channels):
            raise SettingError(
                "The model needs layers >= 1, channels that are multiples of 8 and an image_size divisible by "
                f"2^len(channels), but got layers={layers}, channels={channels}, image_size={image_size}."
            )
        if not (positive(guidance) and guidance >= 1):
            raise SettingError(f"Guidance needs a scale >= 1, but got guidance={guidance}.")
        self.settings = {"channels": list(channels), "layers": layers, "image_size": image_size}
        self.settings["class_names"] = list(class_names)
        self.classes = [ImageClass(name) for name in class_names]
        self.guidance = guidance
        self.image_size = image_size
        self.latent_shape = (3, image_size, image_size)
        alphas = 1 / (1 + karras_sigmas(1000, SIGMA_MIN, SIGMA_MAX).square())
        self.register_buffer("alphas", alphas, persistent=False)
        self.unet = unet_of_squares(channels, layers, len(class_names) + 1)  # the last is the null class
        self.to(memory_format=torch.channels_last)

    def denoise(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Return the posterior mean of the clean images, without guidance.

        Args:
            noisy: (N, 3, H, W) images in [-1, 1] plus Gaussian noise.
            sigma: (N,) standard deviation of that noise.
            labels: (N,) class labels, long; label len(classes) is the null class.

        Returns:
            (N, 3, H, W) images in [-1, 1], not clamped.
        """
        return denoised(self.unet, noisy, sigma, sigma, SIGMA_DATA, labels)

    def noise(self, latents: Tensor, timestep: int, labels: Tensor) -> Tensor:
        alpha = float(self.alphas[timestep])
        sigma, noisy = (1 / alpha - 1) ** 0.5, latents / alpha**0.5
        if self.guidance == 1:
            clean = self.denoise(noisy, noisy.new_full((len(noisy),), sigma), labels)
        else:
            both = torch.cat([labels, torch.full_like(labels, len(self.classes))])
            given, free = self.denoise(noisy.repeat(2, 1, 1, 1), noisy.new_full((len(both),), sigma), both).chunk(2)
            clean = free + self.guidance * (given - free)
        return (noisy - clean) / sigma

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + 1) / 2

    def save(self, path: Path) -> None:
        """Write half-precision weights and the settings to one safetensors file, atomically.

        Raises:
            StorageError: the disk is full or the folder is not writable.
        """
        save_model(self, self.settings, path)


class TrainedConditional(SmallConditional):
    """`SmallConditional` loaded from a model file, by default the shipped CIFAR-10 model.

    Args:
        weights: model file written by `SmallConditional.save`.
        guidance: scale of classifier-free guidance, >= 1; 1 for none.

    Raises:
        MissingFile: the file does not exist.
        StorageError: the file is truncated or does not hold such a model.
    """

    def __init__(self, weights: Path = SHIPPED, guidance: float = GUIDANCE) -> None:
        missing = (
            f"There is no diffusion model at '{weights}'. Train one with `python cli.py fit --config "
            "configs/cifar10_diffusion.yaml`, or give another file."
        )
        advice = "Give a file exported by training: `diffusion.safetensors` in the run directory."
        with opened_model(weights, missing, "a class-conditional diffusion model", advice) as (facts, state):
            super().__init__(**json.loads(facts["settings"]), guidance=guidance)
            self.load_state_dict(state)
        self.eval().requires_grad_(False)


class ClassConditionalDiffusion(AveragedModule):
    """Trains a `SmallConditional` on a dataset with one client, such as `CIFAR10`.

    Adam runs at a constant learning rate, with an exponential moving average (EMA) of the weights instead of annealing,
    so training can be stopped at any time. The EMA network is validated and exported. The validation loss is the
    weighted denoising error with the same noise in every validation.

    Args:
        model: the model to train.
        lr: learning rate of Adam.
        warmup: steps over which the learning rate rises from zero.
        decay: EMA decay per step; early in training, the smaller (1 + steps) / (10 + steps) applies.
        typical_sigma: median noise level of training, for images in [-1, 1].
        spread: standard deviation of log sigma.
        dropout: fraction of training images whose label is replaced by the null class, which guidance requires.
        export: file for the EMA weights, written after every epoch; null for `diffusion.safetensors` in the run
            directory.
        seed: seed of noise levels, noise, horizontal flips and label dropout; null for that of `seed_everything`.

    Raises:
        SettingError: an argument is out of range.
    """

    def __init__(
        self,
        model: SmallConditional,
        lr: float = 1e-3,
        warmup: int = 100,
        decay: float = 0.998,
        typical_sigma: float = 0.6,
        spread: float = 1.4,
        dropout: float = 0.15,
        export: Path | None = None,
        seed: int | None = None,
    ) -> None:
        if not positive(lr, typical_sigma, spread) or warmup < 0 or not 0 <= decay < 1 or not 0 <= dropout < 1:
            raise SettingError(
                "`model` needs lr, typical_sigma and spread > 0, warmup >= 0, decay and dropout in [0, 1), but got "
                f"lr={lr}, typical_sigma={typical_sigma}, spread={spread}, warmup={warmup}, decay={decay}, "
                f"dropout={dropout}."
            )
        super().__init__(model, lr, warmup, decay, export, "diffusion.safetensors", seed or 0)
        self.typical_sigma = typical_sigma
        self.spread = spread
        self.dropout = dropout

    def configure_callbacks(self) -> list[Callback]:
        return [ModelCheckpoint(filename="{step}", save_last=True, auto_insert_metric_name=False)]

    def error(self, network: SmallConditional, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the (N,) denoising errors of images in [0, 1], weighted so that all noise levels count equally."""
        uniform = (torch.arange(len(images)) + torch.rand(len(images), generator=generator)) / len(images)
        normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))  # stratified: every batch has low and high noise
        sigma = self.typical_sigma * (self.spread * normal).exp().clamp(SIGMA_MIN / self.typical_sigma)
        sigma = sigma.clamp(max=SIGMA_MAX).to(images)
        noise = torch.randn(images.shape, generator=generator).to(images)
        clean = 2 * images - 1
        found = network.denoise(clean + sigma[:, None, None, None] * noise, sigma, labels)
        return loss_weight(sigma, SIGMA_DATA) * (found - clean).square().mean((1, 2, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        generator = self.step_generator()
        reflected, withheld = torch.rand(2, len(images), generator=generator).to(images.device)
        images = torch.where(reflected[:, None, None, None] < 0.5, images.flip(3), images)
        labels = labels.masked_fill(withheld < self.dropout, len(self.network.classes))
        loss = self.error(self.network, images, labels, generator).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        error = self.error(self.average.module, images, labels, self.generator).mean()
        self.log("validation_loss", error, prog_bar=True, batch_size=len(images))

    test_step = validation_step
