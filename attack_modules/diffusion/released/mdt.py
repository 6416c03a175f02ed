"""MDTv2 (Gao et al. 2023, arXiv 2303.14389): the diffusion transformer of the paper's semantic enhancement.

Parameter names and shapes are those of the released checkpoint, `mdt_xl2_v2_ckpt.pt`. Its side block and mask token are
used in training only; they are kept so that the checkpoint loads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_lightning.errors import SettingError

FREQUENCIES = 256
"""Dimension of the sinusoidal timestep embedding."""


class Attention(nn.Module):
    """Multi-head self-attention with a learned relative position bias per head."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_bias = RelativePositionBias(side, heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, width = x.shape
        q, k, v = self.qkv(x).view(batch, patches, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, P, -1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.rel_pos_bias())
        return self.proj(x.transpose(1, 2).reshape(batch, patches, width))


class RelativePositionBias(nn.Module):
    """Relative position bias of a grid of `side` x `side` patches, as in BEiT; the last three table rows are unused."""

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn((2 * side - 1) ** 2 + 3, heads))
        row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
        down, across = row[:, None] - row + side - 1, column[:, None] - column + side - 1
        self.register_buffer("relative_position_index", down * (2 * side - 1) + across)

    def forward(self) -> Tensor:
        """Return the (heads, P, P) biases of all pairs of the P = side^2 patches."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Mlp(nn.Module):
    """Two-layer perceptron with a hidden width of 4 * width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaptive layer normalisation (adaLN): the condition sets shifts, scales and gates.

    Args:
        width: embedding dimension of a patch.
        heads: number of attention heads.
        side: patches per row of the square grid.
        skip: whether the block has a skip input, which is concatenated and projected first.
    """

    def __init__(self, width: int, heads: int, side: int, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, side)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, condition: Tensor, skipped: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skipped], dim=-1))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PatchEmbedding(nn.Module):
    """Embedding of 2x2 patches of the latent, in row-major order."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 2, stride=2)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    """Sinusoidal timestep embedding (128 cosines, then 128 sines), followed by a two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timestep.device))
        angles = timestep[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class ClassEmbedding(nn.Module):
    """Class embedding with one row per class and a last row for the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Projection of each patch to 2x2 latent pixels of predicted noise and variance."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, 4 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class MDTv2(nn.Module):
    """Masked diffusion transformer, version 2, with patch size 2; only the inference path.

    The encoder is U-shaped, with long skip connections from the blocks of its first half to those of its second half in
    reverse order. Every decoder block receives the embedded input as its skip input. The defaults are XL/2, as
    released. The sizes are:

    | size | width | depth | heads |
    |---|---|---|---|
    | S | 384 | 12 | 6 |
    | B | 768 | 12 | 12 |
    | L | 1024 | 24 | 16 |
    | XL | 1152 | 28 | 16 |

    Args:
        width: embedding dimension of a patch, a multiple of `heads`.
        depth: number of blocks, including the decoder's; `depth - decoder_depth` must be even.
        heads: attention heads of every block.
        decoder_depth: number of decoder blocks, at least 1.
        latent_size: height and width of the latents, even.
        channels: latent channels; the output has twice as many, first the predicted noise, then the variance.
        num_classes: number of classes; label `num_classes` is the null class.

    Raises:
        SettingError: the sizes do not fit together.
    """

    def __init__(
        self,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        decoder_depth: int = 4,
        latent_size: int = 32,
        channels: int = 4,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        half, odd = divmod(depth - decoder_depth, 2)
        if odd or half < 1 or decoder_depth < 1 or width % heads or latent_size % 2:
            raise SettingError(
                "MDTv2 needs decoder_depth >= 1, a positive even number of encoder blocks (depth - decoder_depth), a "
                f"width divisible by heads and an even latent_size, but got width={width}, depth={depth}, "
                f"heads={heads}, decoder_depth={decoder_depth}, latent_size={latent_size}."
            )
        side = latent_size // 2
        self.x_embedder = PatchEmbedding(channels, width)
        self.t_embedder = TimestepEmbedding(width)
        self.y_embedder = ClassEmbedding(num_classes, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, side**2, width))
        self.decoder_pos_embed = nn.Parameter(0.02 * torch.randn(1, side**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.en_inblocks = nn.ModuleList(Block(width, heads, side) for _ in range(half))
        self.en_outblocks = nn.ModuleList(Block(width, heads, side, skip=True) for _ in range(half))
        self.de_blocks = nn.ModuleList(Block(width, heads, side, skip=True) for _ in range(decoder_depth))
        self.sideblocks = nn.ModuleList([Block(width, heads, side)])
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, latents: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """Predict noise and variance of noisy latents.

        Args:
            latents: (N, C, H, W) noisy latents.
            timestep: (N,) timesteps from 0 to 999.
            labels: (N,) class labels.

        Returns:
            (N, 2C, H, W): predicted noise in the first C channels, variance in the others.
        """
        condition = self.t_embedder(timestep) + self.y_embedder(labels)
        x = embedded = self.x_embedder(latents) + self.pos_embed  # (N, P, width)
        skipped = []
        for block in self.en_inblocks:
            x = block(x, condition)
            skipped.append(x)
        for block in self.en_outblocks:
            x = block(x, condition, skipped.pop())
        x = x + self.decoder_pos_embed
        for block in self.de_blocks:
            x = block(x, condition, embedded)
        squares = self.final_layer(x, condition)  # (N, P, 2 * 2 * 2C)
        side = latents.shape[-1] // 2
        squares = squares.view(len(x), side, side, 2, 2, -1)
        return squares.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, 2 * side, 2 * side)
