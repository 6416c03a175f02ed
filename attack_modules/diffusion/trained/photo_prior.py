"""Small diffusion prior of photographs, trained within hours on one CPU core and used as a denoiser."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.diffusion.trained.averaged_module import AveragedModule
from attack_modules.diffusion.trained.denoising_comparison import DenoisingComparison
from attack_modules.diffusion.trained.edm import denoised, loss_weight, unet_of_squares
from attack_modules.diffusion.trained.model_file import opened_model, save_model
from fl_lightning.errors import SettingError, positive

FORMAT = "curious-client diffusion prior 1"


class TrainedPrior(Denoiser):
    """Convolutional U-Net on 2x2 pixel blocks with the preconditioning of EDM (arXiv 2206.00364, table 1).

    Due to the preconditioning, the untrained network is the best pixelwise linear denoiser, and the output tends to the
    input as the noise vanishes. The pixels of each 2x2 block become channels (as in FFDNet, arXiv 1710.04026), which
    reduces the cost to a quarter. Without attention, it accepts images of any size divisible by `multiple`.

    Args:
        channels: channels of each U-Net level, finest first, multiples of 8; each level halves height and width.
        layers: residual blocks per level.
        sigma_min: lowest noise level of training, in units of [0, 1].
        sigma_max: highest noise level of training, in units of [0, 1].
        sigma_data: standard deviation of a photograph's pixels about mid-grey, in units of [0, 1].

    Raises:
        SettingError: an argument is out of range.
    """

    def __init__(
        self,
        channels: list[int],
        layers: int = 2,
        sigma_min: float = 0.005,
        sigma_max: float = 10.0,
        sigma_data: float = 0.27,
    ) -> None:
        super().__init__()
        if layers < 1 or not channels or any(c < 8 or c % 8 for c in channels):
            raise SettingError(
                f"A prior needs layers >= 1 and channels that are multiples of 8, but got layers={layers}, "
                f"channels={channels}. Use for example layers=2, channels=[64, 128, 152]."
            )
        if not 0 < sigma_min < sigma_max or not positive(sigma_max, sigma_data):
            raise SettingError(
                "A prior needs 0 < sigma_min < sigma_max and sigma_data > 0, but got "
                f"sigma_min={sigma_min}, sigma_max={sigma_max}, sigma_data={sigma_data}."
            )
        self.settings = {
            "channels": list(channels),
            "layers": layers,
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "sigma_data": sigma_data,
        }
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.multiple = 2 ** len(channels)
        self.unet = unet_of_squares(channels, layers)
        self.to(memory_format=torch.channels_last)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """See `Denoiser`; the U-Net is conditioned on `sigma` clamped to [`sigma_min`, `sigma_max`].

        Raises:
            SettingError: the images are not RGB, or their height or width is not a multiple of `multiple`.
        """
        if noisy.ndim != 4 or noisy.shape[1] != 3 or noisy.shape[2] % self.multiple or noisy.shape[3] % self.multiple:
            raise SettingError(
                f"The prior denoises (N, 3, H, W) images with H and W multiples of {self.multiple}, but got "
                f"{tuple(noisy.shape)}. Pad or resize them."
            )
        sigma = sigma.to(noisy).expand(len(noisy))
        told = sigma.clamp(self.sigma_min, self.sigma_max)
        return 0.5 + denoised(self.unet, noisy - 0.5, sigma, told, self.sigma_data)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return the (N,) loss weights under which the U-Net's output error counts equally at every noise level."""
        return loss_weight(sigma, self.sigma_data)

    def save(self, path: Path) -> None:
        """Write half-precision weights and the settings to one safetensors file, atomically.

        Raises:
            StorageError: the disk is full or the folder is not writable.
        """
        save_model(self, self.settings, path, format=FORMAT)

    @classmethod
    def load(cls, path: Path) -> "TrainedPrior":
        """Load a prior from a file written by `save`, in float32 on the CPU, with frozen parameters.

        Raises:
            MissingFile: the file does not exist.
            StorageError: the file is truncated or does not hold such a prior.
        """
        missing = (
            f"There is no prior at '{path}'. Train one with `python cli.py fit --config configs/prior_photos.yaml` "
            "or give another file."
        )
        advice = "Give a file exported by training: `prior.safetensors` in the run directory."
        with opened_model(path, missing, "a diffusion prior", advice) as (facts, state):
            if facts.get("format") != FORMAT:
                raise ValueError(f"its format is {facts.get('format')!r}, not {FORMAT!r}")
            prior = cls(**json.loads(facts["settings"]))
            prior.load_state_dict(state)
        return prior.requires_grad_(False).eval()


class DiffusionPrior(AveragedModule):
    """Trains a `TrainedPrior` as a denoiser of photographs, on the data of `PhotoCrops`.

    Adam runs at a constant learning rate, with an exponential moving average (EMA) of the weights, so training can be
    stopped at any time. The EMA network is validated and exported. Validation measures denoising PSNR at four noise
    levels, with the same noise every time, in comparison with total variation (`DenoisingComparison`).

    Args:
        channels: channels of each U-Net level, finest first, multiples of 8; each level halves height and width.
        layers: residual blocks per level.
        lr: learning rate of Adam.
        warmup: steps over which the learning rate rises from zero.
        cooldown: final steps before the end (`trainer.max_epochs`) over which the learning rate falls to zero; a
            stopped run can be resumed for the cooldown only.
        decay: EMA decay per step; early in training, the smaller (1 + steps) / (10 + steps) applies.
        typical_sigma: median noise level of training, in units of [0, 1].
        spread: standard deviation of log sigma; by default, three quarters of the levels lie between 0.02 and 0.5.
        wide_share: fraction of noise levels that are drawn log-uniformly from the prior's whole range instead.
        export: file for the EMA weights, written after every epoch; null for `prior.safetensors` in the run directory.
        seed: seed of noise levels and noise; null for that of `seed_everything`.

    Raises:
        SettingError: an argument is out of range.
    """

    def __init__(
        self,
        channels: list[int] = [64, 128, 152],  # noqa: B006 - never mutated
        layers: int = 2,
        lr: float = 5e-4,
        warmup: int = 100,
        cooldown: int = 0,
        decay: float = 0.998,
        typical_sigma: float = 0.1,
        spread: float = 1.2,
        wide_share: float = 0.1,
        export: Path | None = None,
        seed: int | None = None,
    ) -> None:
        shares = 0 <= decay < 1 and 0 <= wide_share <= 1
        if not positive(lr, typical_sigma, spread) or min(warmup, cooldown) < 0 or not shares:
            raise SettingError(
                "`model` needs lr, typical_sigma and spread > 0, warmup and cooldown >= 0, decay in [0, 1) and "
                f"wide_share in [0, 1], but got lr={lr}, typical_sigma={typical_sigma}, spread={spread}, "
                f"warmup={warmup}, cooldown={cooldown}, decay={decay}, wide_share={wide_share}."
            )
        super().__init__(
            TrainedPrior(channels, layers), lr, warmup, decay, export, "prior.safetensors", seed or 0, cooldown
        )
        self.typical_sigma = typical_sigma
        self.spread = spread
        self.wide_share = wide_share

    @property
    def prior(self) -> TrainedPrior:
        """The prior with the EMA weights."""
        return self.average.module

    def configure_callbacks(self) -> list[Callback]:
        checkpoint = ModelCheckpoint(
            filename="{step}", save_last=True, auto_insert_metric_name=False, save_on_train_epoch_end=True
        )  # the default would save only after epochs with validation
        return [checkpoint, DenoisingComparison()]

    def noise_levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count,) noise levels in units of [0, 1], stratified so that every batch has low and high ones."""
        uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        low, high = torch.tensor([self.network.sigma_min, self.network.sigma_max]).log()
        wide = low + (high - low) * uniform / max(self.wide_share, 1e-9)
        normal = torch.special.ndtri(
            ((uniform - self.wide_share) / max(1 - self.wide_share, 1e-9)).clamp(1e-6, 1 - 1e-6)
        )
        typical = torch.tensor(self.typical_sigma).log() + self.spread * normal
        return torch.where(uniform < self.wide_share, wide, typical).clamp(low, high).exp()

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        generator = self.step_generator()
        sigma = self.noise_levels(len(images), generator).to(images)
        noise = torch.randn(images.shape, generator=generator).to(images)
        clean = self.network(images + sigma[:, None, None, None] * noise, sigma)
        error = (clean - images).square().mean((1, 2, 3))
        loss = (self.network.loss_weight(sigma) * error).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, images: Tensor, batch_idx: int) -> TrainedPrior:
        return self.prior  # `DenoisingComparison` evaluates it

    test_step = validation_step
