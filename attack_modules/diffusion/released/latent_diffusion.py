"""Latent diffusion of ImageNet's classes: a transformer that predicts noise, guidance, Stable Diffusion's VAE."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from attack_modules.diffusion.classes import imagenet_classes
from attack_modules.diffusion.conditional import ConditionalModel, linear_alphas
from attack_modules.diffusion.released.mdt import MDTv2
from attack_modules.weights import load_strictly, read_weights
from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import SettingError

MDT_XL2 = "https://huggingface.co/shgao/MDT-XL2/resolve/main/mdt_xl2_v2_ckpt.pt"
SD_VAE = "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.safetensors"

GUIDED = 3
"""Channels of the latent that guidance changes. There are four; DiT and MDT were evaluated so, and it was kept."""

RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of the VAE's attention, in its file as released -> in diffusers since 0.15."""


class LatentDiffusion(ConditionalModel):
    """A diffusion transformer over the latents of Stable Diffusion's VAE, by default MDTv2-XL/2 as the paper uses it.

    Classifier-free guidance, with a scale that rises from 1 at the noisiest timestep to `guidance` at the cleanest:
    `1 + (guidance - 1) (1 - cos(pi (1 - t / 1000)^power)) / 2`, so that a small power means nearly full guidance
    throughout (Gao et al. 2023). Only three of the four channels are guided, see `GUIDED`.

    Args:
        backbone: called with (N, 4, H, W) latents, (N,) timesteps and (N,) labels, where label 1000 is no class; gives
            the noise in the first four channels. `MDTv2`, or diffusers' `DiTTransformer2DModel`; null for MDTv2-XL/2.
        weights: the backbone's; null for random ones. No hash of the released file is known to us, so names and shapes
            are what is checked.
        vae: null for the architecture of sd-vae-ft-mse.
        vae_weights: the VAE's; null for random ones.
        guidance: scale of the guidance; 1 for none.
        power: of the schedule; null for the full scale at all timesteps, as DiT has it.
        latent_size: height and width of the latents.

    Raises:
        MissingFile: weights are not there; the message says where to get them.
        StorageError: they do not fit the architecture.
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
        if guidance < 1 or (power is not None and power <= 0):
            raise SettingError(f"Guidance needs a scale >= 1 and a power > 0 or null, but got {guidance} and {power}.")
        # Read first: a missing file shows at once. Whoever has weights to come needs no random ones.
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
        self.register_buffer("alphas", linear_alphas(), persistent=False)

    def scale(self, timestep: int) -> float:
        """The guidance's scale at a timestep from 0 to 999."""
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
    """The autoencoder of Stable Diffusion, by default sd-vae-ft-mse: 8 pixels a latent pixel, four channels.

    Args:
        channels: at each resolution, finest first.
        layers: residual blocks at each resolution of the encoder; the decoder has one more.
        groups: of every group normalisation.
        image_size: height and width of an image.
    """
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
    """The VAE's tensors under the names of today's diffusers, whichever names they came with."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in RENAMED.items():
            if ".attentions." in name:
                name = name.replace(old, new)
        renamed[name] = tensor
    return renamed
