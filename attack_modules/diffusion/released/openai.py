"""OpenAI's guided diffusion (Dhariwal and Nichol 2021, arXiv 2105.05233): the released 256x256 ImageNet model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.diffusion.schedules import linear_beta_sigmas
from fl_lightning.download import CHECKPOINTS, ReleasedFile
from fl_lightning.errors import SettingError
from fl_lightning.storage import load_checkpoint

if TYPE_CHECKING:
    from diffusers import UNet2DModel

UNCONDITIONAL_256 = ReleasedFile(
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/256x256_diffusion_uncond.pt",
    # OpenAI publishes no hash; public tools that verify the file agree on this one (2,211,383,297 bytes).
    "a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
)

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
"""Module names within a residual (`RESNET`) or attention (`ATTENTION`) block: diffusers -> OpenAI."""

Weights = dict[str, Tensor]


class NoisePredictor(Denoiser):
    """Adapter of a noise-predicting network to `Denoiser`, for variance-preserving diffusion with 1000 timesteps.

    Betas rise linearly from 1e-4 to 0.02 (Ho et al. 2020, arXiv 2006.11239). A noise level between two training
    timesteps is mapped to a fractional timestep by linear interpolation in log sigma; the sinusoidal timestep embedding
    of the network accepts it.

    Args:
        network: takes (N, 3, H, W) noisy images in [-1, 1] scaled by sqrt(alpha_bar), and (N,) timesteps. The first 3
            output channels are the noise; further ones are a learned variance, which is not used.
    """

    log_sigmas: Tensor

    def __init__(self, network: UNet2DModel) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        sigmas = linear_beta_sigmas()
        self.register_buffer("log_sigmas", sigmas.log().float())
        self.sigma_min, self.sigma_max = (sigmas[[0, -1]] / 2).tolist()
        self.multiple = 2 ** (len(network.config.block_out_channels) - 1)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        sigma = 2 * sigma.to(noisy).expand(len(noisy))
        column = sigma[:, None, None, None]
        noisy = 2 * noisy - 1
        prediction = self.network(noisy * (1 + column.square()).rsqrt(), self.time(sigma), return_dict=False)[0]
        return (noisy - column * prediction[:, :3] + 1) / 2

    def time(self, sigma: Tensor) -> Tensor:
        """Return the (N,) possibly fractional timesteps, 0 to 999, of (N,) noise levels of images in [-1, 1]."""
        log_sigma = sigma.log().contiguous()
        later = torch.searchsorted(self.log_sigmas, log_sigma).clamp(1, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[later - 1], self.log_sigmas[later]
        return later - 1 + ((log_sigma - low) / (high - low)).clamp(0, 1)


class OpenAIDenoiser(NoisePredictor):
    """OpenAI's unconditional 256x256 ImageNet model: 552,814,086 parameters, 2.2 GB.

    It runs in the precision of its file, float32. The code of arXiv 2410.04661 runs it in fp16, so that single outputs
    differ from these by its rounding (4e-3 for a small network of this architecture).

    Args:
        path: the released `256x256_diffusion_uncond.pt`; null for this file in `checkpoints/`.
        download: whether to download the file if it is missing.

    Raises:
        DownloadError: the file is missing, cannot be downloaded, or does not have the released file's hash.
    """

    def __init__(self, path: Path | None = None, download: bool = False) -> None:
        path = UNCONDITIONAL_256.at(path or CHECKPOINTS / UNCONDITIONAL_256.name, download)
        with torch.device("meta"):  # avoids seconds and 2.2 GB for random weights that are replaced
            network = unet()
        super().__init__(load_released(network, load_checkpoint(path)))


def unet(
    widths: tuple[int, ...] = (256, 256, 512, 512, 1024, 1024),
    depth: int = 2,
    attention_from: int = 3,
    head_width: int = 64,
) -> UNet2DModel:
    """Build OpenAI's network as diffusers' `UNet2DModel`, by default that of the 256x256 models.

    Args:
        widths: channels at each resolution, finest first, multiples of 32.
        depth: residual blocks at each resolution.
        attention_from: index of the first level with self-attention.
        head_width: channels per attention head.
    """
    from diffusers import UNet2DModel  # takes a second to load

    plain, attending = attention_from, len(widths) - attention_from
    return UNet2DModel(
        in_channels=3,
        out_channels=6,
        block_out_channels=widths,
        layers_per_block=depth,
        down_block_types=("ResnetDownsampleBlock2D",) * plain + ("AttnDownBlock2D",) * attending,
        up_block_types=("AttnUpBlock2D",) * attending + ("ResnetUpsampleBlock2D",) * plain,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=head_width,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        norm_eps=1e-5,
    )


def load_released(network: UNet2DModel, released: Weights) -> UNet2DModel:
    """Load OpenAI's weights into the network; the tensors are only renamed, split and squeezed.

    Args:
        network: from `unet`, possibly on the meta device: the loaded tensors replace its parameters without a copy.
        released: state dict of OpenAI's `UNetModel`, with attention in its legacy order (head, qkv, channel).

    Returns:
        The network.

    Raises:
        SettingError: names or shapes differ.
    """
    modules = dict(_modules(network))
    origins = {}
    for name in network.state_dict():
        module, _, kind = name.rpartition(".")
        origins[name] = f"{modules[module]}.{kind}"
    missing, foreign = set(origins.values()) - set(released), set(released) - set(origins.values())
    if missing or foreign:
        raise SettingError(
            "The checkpoint does not match this network ("
            + "; ".join(
                f"{what}: {_some(names)}" for what, names in (("missing", missing), ("unexpected", foreign)) if names
            )
            + f"). Use the released '{UNCONDITIONAL_256.name}'."
        )
    weights, misfits = {}, []
    for name, place in network.state_dict().items():
        weights[name] = _reshaped(name, released[origins[name]], network.config.attention_head_dim)
        if weights[name].shape != place.shape:
            misfits.append(f"{origins[name]} {tuple(released[origins[name]].shape)}")
    if misfits:
        raise SettingError(
            f"The checkpoint's tensor shapes do not match this network: {_some(misfits)}. "
            f"Use the released '{UNCONDITIONAL_256.name}'."
        )
    network.load_state_dict(weights, assign=True)
    return network


def _modules(network: UNet2DModel) -> Iterator[tuple[str, str]]:
    """Yield (diffusers' module, OpenAI's module) names, including modules that some levels do not have."""
    yield from {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items()
    pairs = [
        ("mid_block.resnets.0", "middle_block.0", RESNET),
        ("mid_block.attentions.0", "middle_block.1", ATTENTION),
        ("mid_block.resnets.1", "middle_block.2", RESNET),
    ]
    index = 1  # OpenAI numbers the blocks of all levels consecutively, including downsamplers
    for level, block in enumerate(network.down_blocks):
        for j in range(len(block.resnets)):
            pairs.append((f"down_blocks.{level}.resnets.{j}", f"input_blocks.{index}.0", RESNET))
            pairs.append((f"down_blocks.{level}.attentions.{j}", f"input_blocks.{index}.1", ATTENTION))
            index += 1
        if block.downsamplers:
            pairs.append((f"down_blocks.{level}.downsamplers.0", f"input_blocks.{index}.0", RESNET))
            index += 1
    index = 0
    for level, block in enumerate(network.up_blocks):
        for j in range(len(block.resnets)):
            pairs.append((f"up_blocks.{level}.resnets.{j}", f"output_blocks.{index}.0", RESNET))
            pairs.append((f"up_blocks.{level}.attentions.{j}", f"output_blocks.{index}.1", ATTENTION))
            index += 1
        if block.upsamplers:  # OpenAI's upsampler is the last part of a level's last block
            part = 2 if hasattr(block, "attentions") else 1
            pairs.append((f"up_blocks.{level}.upsamplers.0", f"output_blocks.{index - 1}.{part}", RESNET))
    for ours, theirs, names in pairs:
        yield from ((f"{ours}.{our}", f"{theirs}.{their}") for our, their in names.items())


def _reshaped(name: str, weight: Tensor, head_width: int) -> Tensor:
    """Return a tensor of OpenAI's state dict in the form of the parameter `name` of diffusers' network."""
    module = name.split(".")[-2]
    if module in ("to_q", "to_k", "to_v"):  # (3C, C, 1) or (3C,), with rows in the order (head, qkv, channel)
        rows = weight.reshape(-1, 3, head_width, *weight.shape[1:2])
        return rows[:, ("to_q", "to_k", "to_v").index(module)].flatten(0, 1)
    return weight.squeeze(-1) if ".to_out." in name else weight  # a 1x1 convolution equals a linear layer


def _some(names: set[str] | list[str]) -> str:
    """List the first three names and the number of further ones."""
    shown = sorted(names)[:3]
    return (", ".join(shown) or "none") + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
