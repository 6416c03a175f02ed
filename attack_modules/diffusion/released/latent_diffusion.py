"""Class-conditional latent diffusion on ImageNet: a diffusion transformer, guidance and Stable Diffusion's VAE."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attack_modules.diffusion.classes import imagenet_classes
from attack_modules.diffusion.conditional import ConditionalModel
from attack_modules.diffusion.released.mdt import MDTv2
from attack_modules.diffusion.schedules import linear_beta_alphas
from attack_modules.weights import load_strictly, read_weights
from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import SettingError, positive

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

MDT_XL2 = "https://huggingface.co/shgao/MDT-XL2/resolve/main/mdt_xl2_v2_ckpt.pt"
SD_VAE = "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.safetensors"

GUIDED = 3
"""Number of latent channels, out of four, that are guided; kept because DiT and MDT were evaluated this way."""

RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Name parts of the VAE's attention parameters: in the released file -> in diffusers since 0.15."""


class LatentDiffusion(ConditionalModel):
    """Diffusion transformer on the latents of Stable Diffusion's VAE, by default MDTv2-XL/2 as in the paper.

    The scale of classifier-free guidance rises as the noise falls, from 1 at t = 1000 to `guidance` at t = 0:
    `1 + (guidance - 1) (1 - cos(pi (1 - t / 1000)^power)) / 2` (Gao et al. 2023). A small power gives nearly full
    guidance at all timesteps. Only three of the four latent channels are guided, see `GUIDED`.

    Args:
        backbone: noise predictor, called with (N, 4, H, W) latents, (N,) timesteps and (N,) labels, where label 1000 is
            the null class; the first four output channels are the noise. `MDTv2`, or diffusers'
            `DiTTransformer2DModel`; null for MDTv2-XL/2.
        weights: checkpoint of the backbone; null for random weights. Only names and shapes are checked, because no hash
            of the released file is known.
        vae: autoencoder; null for the architecture of sd-vae-ft-mse.
        vae_weights: checkpoint of the VAE; null for random weights.
        guidance: guidance scale, >= 1; 1 for none.
        power: exponent of the guidance schedule, > 0; null for the full scale at all timesteps, as in DiT.
        latent_size: height and width of the latents.

    Raises:
        SettingError: `guidance` or `power` is out of range.
        MissingFile: a checkpoint is missing; the message says where to get it.
        StorageError: a checkpoint does not fit the architecture.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        weights: Path | None = CHECKPOINTS / "mdt_xl2_v2_ckpt.pt",
        vae: AutoencoderKL | None = None,
        vae_weights: Path | None = CHECKPOINTS / "sd-vae-ft-mse.safetensors",
        guidance: float = 4.0,
        power: float | None = 0.01,
        latent_size: int = 32,
    ) -> None:
        super().__init__()
        if not (positive(guidance) and guidance >= 1) or (power is not None and not positive(power)):
            raise SettingError(f"Guidance needs a scale >= 1 and a power > 0 or null, but got {guidance} and {power}.")
        # The files are read first, so that a missing one fails before the networks are built. Networks whose weights
        # are loaded are built on the meta device, which avoids a random initialisation.
        state = weights and read_weights(weights, MDT_XL2, parts=("ema",))
        vae_state = vae_weights and _renamed(read_weights(vae_weights, SD_VAE))
        with torch.device("meta" if state else "cpu"):
            self.backbone = backbone or MDTv2()
        with torch.device("meta" if vae_state else "cpu"):
            self.vae = vae or sd_vae()
        if state:
            load_strictly(self.backbone, state, weights)
        if vae_state:
            load_strictly(self.vae, vae_state, vae_weights)
        self.eval().requires_grad_(False)
        self.guidance = guidance
        self.power = power
        self.classes = imagenet_classes()
        self.latent_shape = (self.vae.config.latent_channels, latent_size, latent_size)
        self.image_size = latent_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.register_buffer("alphas", linear_beta_alphas(), persistent=False)

    def scale(self, timestep: int) -> float:
        """Return the guidance scale at a timestep from 0 to 999."""
        if self.power is None:
            return self.guidance
        share = (1 - math.cos(math.pi * (1 - timestep / len(self.alphas)) ** self.power)) / 2
        return 1 + (self.guidance - 1) * share

    def noise(self, latents: Tensor, timestep: int, labels: Tensor) -> Tensor:
        times = torch.full((2 * len(latents),), timestep, device=latents.device)
        both = torch.cat([labels, torch.full_like(labels, len(self.classes))])
        output = self.backbone(torch.cat([latents, latents]), times, both)
        predicted = getattr(output, "sample", output)[:, : latents.shape[1]]
        given, free = predicted.chunk(2)
        guided = free[:, :GUIDED] + self.scale(timestep) * (given - free)[:, :GUIDED]
        return torch.cat([guided, given[:, GUIDED:]], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return (self.vae.decode(latents / self.vae.config.scaling_factor).sample + 1) / 2


def sd_vae(
    channels: tuple[int, ...] = (128, 256, 512, 512), layers: int = 2, groups: int = 32, image_size: int = 256
) -> AutoencoderKL:
    """Build Stable Diffusion's autoencoder, by default sd-vae-ft-mse: downsampling factor 8, four latent channels.

    Args:
        channels: channels at each resolution, finest first.
        layers: residual blocks at each resolution of the encoder; the decoder has one more.
        groups: number of groups of every group normalisation.
        image_size: height and width of an image, in pixels.
    """
    from diffusers import AutoencoderKL  # takes a second to load

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=image_size,
        scaling_factor=0.18215,
    )


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE's state dict with the names of diffusers since 0.15; the input has these or the old names."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in RENAMED.items():
            if ".attentions." in name:
                name = name.replace(old, new)
        renamed[name] = tensor
    return renamed
