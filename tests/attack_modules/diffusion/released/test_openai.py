"""The converted network against an independent one, written after OpenAI's description with its names."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.diffusion.released.openai import NoisePredictor, OpenAIDenoiser, _modules, load_released, unet
from fl_lightning.download import DownloadError
from fl_lightning.errors import SettingError

WIDTHS, DEPTH, ATTENTION_FROM, HEAD = (32, 64, 64), 2, 1, 16


class ResBlock(nn.Module):
    """BigGAN's residual block, whose resampling stands between the first norm and the first convolution."""

    def __init__(self, width: int, out: int, emb: int, resample: float = 1.0) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)
        self.resample = resample

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample < 1:
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0) if self.resample > 1 else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self._resampled(act(norm(x))))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self._resampled(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention in the legacy order: rows of qkv are cut into heads first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        flat = x.flatten(2)
        heads = [part.chunk(3, dim=1) for part in self.qkv(self.norm(flat)).split(3 * HEAD, dim=1)]
        mixed = [(q.transpose(1, 2) @ k / math.sqrt(HEAD)).softmax(-1) @ v.transpose(1, 2) for q, k, v in heads]
        return x + self.proj_out(torch.cat([m.transpose(1, 2) for m in mixed], 1)).reshape(x.shape)


class Convolution(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x)


class UNetModel(nn.Module):
    """OpenAI's `UNetModel` with resblock_updown, use_scale_shift_norm, learn_sigma."""

    def __init__(self) -> None:
        super().__init__()
        base, emb = WIDTHS[0], 4 * WIDTHS[0]
        self.base = base
        self.time_embed = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([nn.ModuleList([Convolution(3, base, 3, padding=1)])])
        skips, width = [base], base
        for level, out in enumerate(WIDTHS):
            for _ in range(DEPTH):
                parts = [ResBlock(width, out, emb)] + ([AttentionBlock(out)] if level >= ATTENTION_FROM else [])
                self.input_blocks.append(nn.ModuleList(parts))
                width = out
                skips.append(width)
            if level < len(WIDTHS) - 1:
                self.input_blocks.append(nn.ModuleList([ResBlock(width, width, emb, resample=0.5)]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [ResBlock(width, width, emb), AttentionBlock(width), ResBlock(width, width, emb)]
        )
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(WIDTHS))):
            for j in range(DEPTH + 1):
                parts = [ResBlock(width + skips.pop(), out, emb)]
                if level >= ATTENTION_FROM:
                    parts.append(AttentionBlock(out))
                if level and j == DEPTH:
                    parts.append(ResBlock(out, out, emb, resample=2.0))
                self.output_blocks.append(nn.ModuleList(parts))
                width = out
        self.out = nn.Sequential(nn.GroupNorm(32, base), nn.SiLU(), nn.Conv2d(base, 6, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.base // 2) / (self.base // 2))
        angles = time[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        skips = []
        for block in self.input_blocks:
            for part in block:
                x = part(x, emb)
            skips.append(x)
        for part in self.middle_block:
            x = part(x, emb)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], 1)
            for part in block:
                x = part(x, emb)
        return self.out(x)


@pytest.fixture(scope="module")
def original() -> UNetModel:
    torch.manual_seed(0)
    model = UNetModel().eval()
    for name, parameter in model.named_parameters():  # norms too, whose ones and zeros would hide an exchange
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and "weight" in name), std=0.1)
    return model


@pytest.fixture
def converted(original: UNetModel) -> NoisePredictor:
    return NoisePredictor(load_released(unet(WIDTHS, DEPTH, ATTENTION_FROM, HEAD), original.state_dict()))


@torch.no_grad()
def test_the_converted_network_is_the_original(original: UNetModel, converted: NoisePredictor) -> None:
    x, time = torch.randn(3, 3, 16, 24), torch.tensor([0, 417, 999])
    expected = original(x, time)
    assert expected.std() > 0.1
    torch.testing.assert_close(converted.network(x, time).sample, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_denoiser_is_tweedie_at_every_time_of_training(original: UNetModel, converted: NoisePredictor) -> None:
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    time = torch.tensor([0, 1, 500, 999])
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()[time].float() / 2  # in units of [0, 1]
    assert converted.sigma_min == pytest.approx(sigma[0].item())
    assert converted.sigma_max == pytest.approx(sigma[3].item())
    assert converted.multiple == 4
    torch.testing.assert_close(converted.time(2 * sigma), time.float(), atol=1e-3, rtol=0)
    noisy = torch.rand(4, 3, 8, 8) + sigma[:, None, None, None] * torch.randn(4, 3, 8, 8)
    root = alpha_bar[time].sqrt().float()[:, None, None, None]
    scaled = root * (2 * noisy - 1)
    noise = original(scaled, time)[:, :3]
    clean = (scaled - (1 - root.square()).sqrt() * noise) / root  # equation 12 of DDIM, arXiv 2010.02502
    torch.testing.assert_close(converted(noisy, sigma), (clean + 1) / 2, atol=1e-4, rtol=1e-4)


def test_a_single_sigma_serves_all_images(converted: NoisePredictor) -> None:
    noisy = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(converted(noisy, torch.tensor(0.1)), converted(noisy, torch.full((2,), 0.1)))


def test_times_between_those_of_training_are_interpolated(converted: NoisePredictor) -> None:
    sigmas = converted.log_sigmas.exp()
    between = (sigmas[[0, 500]] * sigmas[[1, 501]]).sqrt()
    torch.testing.assert_close(converted.time(between), torch.tensor([0.5, 500.5]), atol=1e-3, rtol=0)


def test_a_checkpoint_that_does_not_fit_is_refused(original: UNetModel) -> None:
    network = unet(WIDTHS, DEPTH, ATTENTION_FROM, HEAD)
    weights = original.state_dict()
    weights["label_emb.weight"] = weights.pop("out.2.bias")
    with pytest.raises(SettingError, match=r"missing: out\.2\.bias; unexpected: label_emb\.weight\)\. Use the rel"):
        load_released(network, weights)
    weights = original.state_dict()
    weights["out.2.bias"] = torch.zeros(3)
    with pytest.raises(SettingError, match=r"shapes do not match this network: out\.2\.bias \(3,\)"):
        load_released(network, weights)


def test_the_released_size() -> None:
    with torch.device("meta"):
        network = unet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 552_814_086
    assert len(network.state_dict()) == 630
    modules = dict(_modules(network))
    released = {f"{modules[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in network.state_dict()}
    assert len(released) == 566


def test_without_the_file_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="Set `download: true` to fetch it"):
        OpenAIDenoiser(tmp_path / "256x256_diffusion_uncond.pt")
