"""MDTv2, its guidance and the VAE: names and shapes of the released files, the rest on small models."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from attack_modules.diffusion.classes import ImageClass, class_index, imagenet_classes
from attack_modules.diffusion.conditional import ConditionalModel, ddim, explicit_timesteps
from attack_modules.diffusion.released.latent_diffusion import LatentDiffusion, sd_vae
from attack_modules.diffusion.released.mdt import MDTv2
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.storage import StorageError

SMALL = {"width": 32, "depth": 5, "heads": 2, "decoder_depth": 1, "latent_size": 8}


def small_vae() -> nn.Module:
    return sd_vae((16, 16, 32, 32), layers=1, groups=8, image_size=64)


def small_model(**settings: object) -> LatentDiffusion:
    torch.manual_seed(0)
    chosen = {"backbone": MDTv2(**SMALL), "weights": None, "vae": small_vae(), "vae_weights": None, "latent_size": 8}
    return LatentDiffusion(**{**chosen, **settings})


def sizes(module: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in module.parameters()), len(module.state_dict())


def test_the_released_sizes() -> None:
    with torch.device("meta"):
        xl, vae = MDTv2(), sd_vae()
    assert sizes(xl) == (742_263_904, 394)
    assert sizes(vae) == (83_653_863, 248)
    assert sum(p.numel() for n, p in xl.named_parameters() if "sideblocks" in n or n == "mask_token") == 23_921_728
    shapes = {name: tuple(tensor.shape) for name, tensor in xl.state_dict().items()}
    assert shapes["en_inblocks.11.attn.rel_pos_bias.relative_position_bias_table"] == (964, 16)
    assert shapes["en_outblocks.0.skip_linear.weight"] == (1152, 2304)
    assert shapes["de_blocks.3.adaLN_modulation.1.weight"] == (6912, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)


def test_a_forward_pass_by_hand() -> None:
    """The wiring of the U: last in, first out; the decoder sees the embedded input."""
    torch.manual_seed(0)
    model = MDTv2(**SMALL).double()
    x, t, y = torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 700]), torch.tensor([5, 1000])
    condition = model.t_embedder(t) + model.y_embedder(y)
    first = model.x_embedder(x) + model.pos_embed
    one = model.en_inblocks[0](first, condition)
    two = model.en_inblocks[1](one, condition)
    three = model.en_outblocks[1](model.en_outblocks[0](two, condition, two), condition, one)
    last = model.final_layer(model.de_blocks[0](three + model.decoder_pos_embed, condition, first), condition)
    output = model(x, t, y)
    assert output.shape == (2, 8, 8, 8)
    # patch (row 1, column 2), pixel (1, 0) in it, channel 5
    assert output[0, 5, 3, 4].item() == pytest.approx(last[0, 1 * 4 + 2, (1 * 2 + 0) * 8 + 5].item(), rel=1e-9)


def test_attention_is_softmax_with_a_bias_for_the_relative_position() -> None:
    torch.manual_seed(0)
    attention = MDTv2(**SMALL).en_inblocks[0].attn.double()
    x = torch.randn(1, 16, 32).double()
    q, k, v = attention.qkv(x).view(16, 3, 2, 16).unbind(1)
    out = torch.empty(16, 2, 16).double()
    for i in range(16):
        for head in range(2):
            down, across = i // 4 - torch.arange(16) // 4 + 3, i % 4 - torch.arange(16) % 4 + 3
            bias = attention.rel_pos_bias.relative_position_bias_table[down * 7 + across, head]
            out[i, head] = (k[:, head] @ q[i, head] / 4 + bias).softmax(0) @ v[:, head]
    torch.testing.assert_close(attention(x), attention.proj(out.view(1, 16, 32)))


def test_guidance_changes_three_of_four_channels_by_the_power_schedule() -> None:
    model = small_model(guidance=4.0, power=2.0)
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    times = torch.full((2,), 250)
    given = model.backbone(x, times, labels)[:, :4]
    free = model.backbone(x, times, torch.tensor([1000, 1000]))[:, :4]
    scale = 1 + 3 * (1 - math.cos(math.pi * 0.75**2)) / 2
    noise = model.noise(x, 250, labels)
    torch.testing.assert_close(noise[:, :3], (free + scale * (given - free))[:, :3])
    torch.testing.assert_close(noise[:, 3], given[:, 3])
    assert small_model(power=None).scale(999) == 4
    assert small_model(power=0.01).scale(0) == pytest.approx(4)


def test_timesteps_are_those_of_ddpm_respacing() -> None:
    steps = explicit_timesteps(250, 1000)
    assert (steps[0], steps[-1], len(set(steps))) == (999, 0, 250)
    assert {a - b for a, b in itertools.pairwise(steps)} == {4, 5}
    assert explicit_timesteps(21, 1000)[10] == 499
    for count in range(1, 1001):  # as guided-diffusion's `space_timesteps` goes
        stride = 1 if count <= 1 else 999 / (count - 1)
        place, taken = 0.0, set()
        for _ in range(count):
            taken.add(round(place))
            place += stride
        assert explicit_timesteps(count, 1000) == sorted(taken, reverse=True), count
        assert len(taken) == count
    for count in (0, 1001):
        with pytest.raises(SettingError, match=f"`timesteps` is {count}, .* Give a number from 1 to 1000"):
            explicit_timesteps(count, 1000)


def test_ddim_is_exact_where_the_noise_is_known() -> None:
    """One latent x in the world: the noise in z is known, and every step must keep to x."""
    model = small_model()
    x = torch.randn(1, 4, 8, 8)
    model.noise = lambda latents, t, labels: (latents - model.alphas[t].sqrt() * x) / (1 - model.alphas[t]).sqrt()
    sample = ddim(model, torch.randn(1, 4, 8, 8).double(), torch.tensor([0]), explicit_timesteps(10, 1000))
    torch.testing.assert_close(sample.latents.float(), x)
    assert sample.gain == pytest.approx(float(model.alphas[999]) ** -0.5)


def test_diffusers_transformer_as_backbone() -> None:
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
                "num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 1000}  # fmt: skip
    model = small_model(backbone=DiTTransformer2DModel(**settings), power=None)
    sample = ddim(model, torch.randn(1, 4, 8, 8), torch.tensor([7]), [999, 500, 0])
    assert model.decode(sample.latents).shape == (1, 3, 64, 64)


def test_the_backbone_by_class_path() -> None:
    """As on the command line, with diffusers' class."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "out_channels": 8,
        "num_layers": 1,
        "sample_size": 32,
    }
    backbone = {"class_path": "diffusers.DiTTransformer2DModel", "init_args": settings}
    vae = {"class_path": "diffusers.AutoencoderKL", "init_args": {"latent_channels": 4}}
    parser = ArgumentParser()
    parser.add_argument("--model", type=ConditionalModel)
    arguments = {"backbone": backbone, "weights": None, "vae": vae, "vae_weights": None, "power": None}
    parsed = parser.parse_object({"model": {"class_path": "LatentDiffusion", "init_args": arguments}})
    model = parser.instantiate_classes(parsed).model
    assert isinstance(model.backbone, DiTTransformer2DModel)
    assert model.noise(torch.randn(1, 4, 32, 32), 5, torch.tensor([1])).shape == (1, 4, 32, 32)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, LatentDiffusion]:
    model = small_model()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 10)
    torch.save({"ema": model.backbone.state_dict()}, tmp_path / "mdt.pt")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # as Stability released it
    state: dict[str, Tensor] = {}
    for name, tensor in model.vae.state_dict().items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        state[name] = tensor
    torch.save(state, tmp_path / "vae.pt")
    return tmp_path / "mdt.pt", tmp_path / "vae.pt", model


def test_weights_are_loaded_by_name(saved: tuple[Path, Path, LatentDiffusion]) -> None:
    backbone, vae, model = saved
    loaded = small_model(weights=backbone, vae_weights=vae)
    x, labels = torch.randn(1, 4, 8, 8), torch.tensor([3])
    torch.testing.assert_close(loaded.noise(x, 5, labels), model.noise(x, 5, labels))
    torch.testing.assert_close(loaded.decode(x), model.decode(x))


def test_foreign_and_missing_weights_are_refused(saved: tuple[Path, Path, LatentDiffusion], tmp_path: Path) -> None:
    backbone, vae, _ = saved
    with pytest.raises(StorageError, match=r"MDTv2 with its 92 tensors: 272 .*de_blocks.0.attn.proj.weight is missing"):
        small_model(weights=vae)
    wider = MDTv2(**{**SMALL, "width": 48})
    with pytest.raises(StorageError, match=r"attn.proj.weight is \(32, 32\), not \(48, 48\)"):
        small_model(backbone=wider, weights=backbone)
    with pytest.raises(MissingFile, match=r"no weights at .*gone.pt'. Get them from https://huggingface.co/shgao"):
        small_model(weights=tmp_path / "gone.pt")


def test_settings_that_cannot_be() -> None:
    with pytest.raises(SettingError, match="a positive even number of encoder blocks"):
        MDTv2(depth=6, decoder_depth=1)
    with pytest.raises(SettingError, match="scale >= 1"):
        small_model(guidance=0.5)


def test_a_class_by_index_synset_or_name() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert {class_index(wanted, classes) for wanted in (199, "199", "n02097298", "Scotch terrier")} == {199}
    twice = [ImageClass("crane", "n02012849"), ImageClass("crane", "n03126707")]
    with pytest.raises(SettingError, match=r"called 'crane'. Give the index instead: 0 \(n02012849\) or 1 \(n031"):
        class_index("crane", twice)
    with pytest.raises(SettingError, match="index 1000 is out of range: the model has classes 0 to 999"):
        class_index(1000, classes)
    with pytest.raises(SettingError, match="index -1 is out of range"):
        class_index("-1", classes)
    with pytest.raises(SettingError, match=r"no class 'scotch terier'.*'Scotch terrier'"):
        class_index("scotch terier", classes)


@pytest.mark.parametrize("wanted", ["", " ", "--5", "-", "5.0", "9" * 5000])
@pytest.mark.parametrize("classes", [imagenet_classes(), [ImageClass("cat")], [ImageClass("cat"), ImageClass("dog")]])
def test_what_names_no_class(wanted: str, classes: list[ImageClass]) -> None:
    with pytest.raises(SettingError, match="has no class '"):
        class_index(wanted, classes)
