"""Callback that compares a denoiser with total variation (TV) by PSNR, and logs example images and samples."""

from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.diffusion.schedules import karras_sigmas
from attack_modules.panels import draw_panel

LEVELS = (0.05, 0.1, 0.2, 0.4)
"""Noise levels at which denoisers are compared, in units of [0, 1]."""
TV_WEIGHTS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.4)
"""Candidate TV weights, as multiples of sigma."""


class DenoisingComparison(Callback):
    """Logs `psnr/SIGMA` of the module's denoiser and `psnr_tv/SIGMA` of TV denoising in validation and test.

    At each noise level, the TV weight is the best one on the datamodule's `tuning_images`. TV results are computed once
    and cached, because images and noise are the same in every validation. Denoised images and samples are logged to
    TensorBoard.

    The module's `validation_step` and `test_step` must return a `Denoiser`; the datamodule must provide
    `tuning_images`, (N, 3, H, W) in [0, 1].

    Args:
        shown: number of images in the logged panels.
    """

    def __init__(self, shown: int = 8) -> None:
        self.shown = shown
        self._weights: dict[float, float] = {}
        self._total_variation: dict[tuple[str, int, float], Tensor] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self._compare("validation", trainer, pl_module, outputs, batch, batch_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self._compare("test", trainer, pl_module, outputs, batch, batch_idx)

    def _compare(
        self, stage: str, trainer: Trainer, module: LightningModule, denoiser: Denoiser, images: Tensor, batch_idx: int
    ) -> None:
        if trainer.sanity_checking:
            return
        for sigma in LEVELS:
            noisy = add_noise(images, sigma, seed=batch_idx)
            denoised = denoiser(noisy, torch.tensor(sigma)).clamp(0, 1)
            smooth = self._smooth(stage, trainer, noisy, sigma, batch_idx)
            scores = {f"psnr/{sigma}": psnr(denoised, images), f"psnr_tv/{sigma}": psnr(smooth, images)}
            module.log_dict(
                {name: score.mean() for name, score in scores.items()}, batch_size=len(images), sync_dist=True
            )
            if batch_idx == 0 and isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
                rows = {"original": images, "noisy": noisy, "total variation": smooth, "prior": denoised}
                panel = draw_panel({name: row[: self.shown] for name, row in rows.items()})
                trainer.logger.experiment.add_image(f"denoised/{sigma}", pil_to_tensor(panel), trainer.global_step)
        if batch_idx == 0 and isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            side = 8 * denoiser.multiple
            samples = sample(denoiser, (self.shown, 3, side, side), images.device)
            picture = pil_to_tensor(draw_panel({"samples": samples}))
            trainer.logger.experiment.add_image("samples", picture, trainer.global_step)

    def _smooth(self, stage: str, trainer: Trainer, noisy: Tensor, sigma: float, batch_idx: int) -> Tensor:
        """Return the batch denoised by TV, cached because batch and noise are the same in every validation."""
        if sigma not in self._weights:
            clean = trainer.datamodule.tuning_images
            grainy = add_noise(clean, sigma, seed=-1)
            self._weights[sigma] = max(
                (weight * sigma for weight in TV_WEIGHTS),
                key=lambda weight: float(psnr(total_variation_denoised(grainy, weight), clean).mean()),
            )
        key = (stage, batch_idx, sigma)
        if key not in self._total_variation:
            self._total_variation[key] = total_variation_denoised(noisy, self._weights[sigma])
        return self._total_variation[key]


def add_noise(images: Tensor, sigma: float, seed: int) -> Tensor:
    """Add Gaussian noise of standard deviation `sigma` to images; the same seed gives the same noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return images + sigma * noise.to(images)


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Return the (N,) peak signal-to-noise ratios in dB of (N, C, H, W) images in [0, 1]."""
    return -10 * (images - originals).square().mean((1, 2, 3)).log10()


def total_variation_denoised(noisy: Tensor, weight: float) -> Tensor:
    """Denoise (N, C, H, W) images by TV (Chambolle 2004; `skimage.restoration`) and clamp them to [0, 1]."""
    smooth = [denoise_tv_chambolle(image.cpu().numpy(), weight, channel_axis=0) for image in noisy]
    return torch.stack([torch.from_numpy(image) for image in smooth]).to(noisy).clamp(0, 1)


@torch.no_grad()
def sample(
    denoiser: Denoiser, shape: tuple[int, int, int, int], device: torch.device, steps: int = 24, seed: int = 0
) -> Tensor:
    """Sample images by Euler steps of the probability flow ODE, clamped to [0, 1].

    The noise levels fall from the denoiser's `sigma_max` to its `sigma_min` (EDM, arXiv 2206.00364, equation 5 with
    rho = 7), then to zero.
    """
    sigmas = [*karras_sigmas(steps, denoiser.sigma_max, denoiser.sigma_min).tolist(), 0.0]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    images = 0.5 + sigmas[0] * noise
    for sigma, following in pairwise(sigmas):
        clean = denoiser(images, torch.tensor(sigma))
        images = clean + following / sigma * (images - clean)
    return images.clamp(0, 1)
