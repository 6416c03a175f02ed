"""ROG's networks: released names and shapes, wiring, USRNet's data step against its normal equations; spandrel."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.enhance.restoration import Restoration
from attack_modules.enhance.rog import enhancer as gan
from attack_modules.enhance.rog import networks
from attack_modules.enhance.rog.enhancer import GAN
from attack_modules.enhance.rog.networks import Generator, RogDenoiser
from attack_modules.enhance.rog.usrnet import ResUNet, USRNet, data_step
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.storage import StorageError


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_released_names_and_shapes() -> None:
    with torch.device("meta"):
        generator, denoiser, usrnet = Generator(), RogDenoiser(), USRNet()
    assert [len(shapes(m)) for m in (generator, denoiser, usrnet)] == [48, 24, 42]
    assert [numbers(m) for m in (generator, denoiser, usrnet)] == [27_350_996, 22_230_996, 17_016_016]
    found = shapes(generator)
    assert found["Conv1.conv.weight"] == (64, 3, 5, 5)
    assert found["ConvT2.convT.weight"] == (768, 768, 4, 4)
    assert found["ConvT3.bn.gain.weight"] == (1000, 384)
    assert found["Conv6.bn.stored_var"] == (256,)
    assert found["Conv9.weight"] == (3, 67, 3, 3)
    found = shapes(denoiser)
    assert found["Conv5.conv_block.0.weight"] == (512, 512, 3, 3)
    assert found["ConvT1.convT_block.0.bias"] == (512,)
    found = shapes(usrnet)
    assert found["p.m_down3.2.weight"] == (512, 256, 2, 2)
    assert found["p.m_up1.2.res.2.weight"] == (64, 64, 3, 3)
    assert found["p.m_up3.0.weight"] == (512, 256, 2, 2)
    assert found["h.mlp.4.bias"] == (16,)


def test_class_conditional_batch_norm_by_hand() -> None:
    norm = networks.ClassBatchNorm(2, 3)
    norm.stored_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.stored_var.copy_(torch.tensor([4.0, 9.0]))
    x = torch.full((2, 2, 1, 1), 5.0)
    labels = torch.tensor([2, 0])
    expected = (5 - norm.stored_mean) / (norm.stored_var + 1e-5).sqrt() * (1 + norm.gain.weight[labels])
    torch.testing.assert_close(norm(x, labels)[:, :, 0, 0], expected + norm.bias.weight[labels])


@pytest.mark.parametrize("network", [Generator(4, 5), RogDenoiser(4)])
def test_encoder_decoder_keeps_the_size_and_stays_in_range(network: nn.Module) -> None:
    x = torch.rand(2, 3, 24, 16)
    y = network.eval()(x, torch.tensor([1, 4]))
    assert y.shape == x.shape
    assert y.min() >= 0 and y.max() <= 1


def blurred(x: Tensor, kernel: Tensor, factor: int) -> Tensor:
    """Circular convolution about the kernel's centre, sampled."""
    out = torch.zeros_like(x)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            out += kernel[i, j] * x.roll((i - kernel.shape[0] // 2, j - kernel.shape[1] // 2), (-2, -1))
    return out[..., ::factor, ::factor]


def test_the_data_step_solves_its_normal_equations() -> None:
    torch.manual_seed(0)
    kernel = torch.rand(5, 5).double()
    kernel /= kernel.sum()
    estimate, small = torch.rand(2, 1, 16, 8).double(), torch.rand(2, 1, 4, 2).double()
    alpha = torch.tensor([0.3, 2.0]).double().view(2, 1, 1, 1)
    solved = data_step(estimate, small, kernel, 4, alpha).requires_grad_()
    objective = (blurred(solved, kernel, 4) - small).square().sum() + (alpha * (solved - estimate).square()).sum()
    (gradient,) = torch.autograd.grad(objective, solved)
    assert gradient.abs().max() < 1e-12


def test_usrnet_takes_any_size() -> None:
    assert ResUNet(4)(torch.rand(1, 4, 20, 12)).shape == (1, 3, 20, 12)
    assert USRNet(4)(torch.rand(2, 3, 6, 5), torch.full((3, 3), 1 / 9), 4, 0.01).shape == (2, 3, 24, 20)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as released, of networks an eighth as wide with 5 classes."""
    torch.manual_seed(0)
    for name, make in {"Generator": lambda: Generator(8, 5), "RogDenoiser": lambda: RogDenoiser(8),
                       "USRNet": lambda: USRNet(8)}.items():  # fmt: skip
        monkeypatch.setattr(gan, name, make)
    monkeypatch.setattr(gan, "NUM_CLASSES", 5)
    torch.save({"gen_state_dict": gan.Generator().state_dict(), "dis_state_dict": {}}, tmp_path / "postmodel.pth")
    torch.save({"gen_state_dict": gan.RogDenoiser().state_dict()}, tmp_path / "denoiser.pth")
    torch.save(gan.USRNet().state_dict(), tmp_path / "usrgan.pth")
    kernels = np.empty((1, 3), dtype=object)
    for index in range(3):
        kernels[0, index] = np.full((index + 3, index + 3), 1 / (index + 3) ** 2)
    savemat(tmp_path / "kernels_bicubicx234.mat", {"kernels": kernels})
    return tmp_path


def linearly_enlarged(small: Tensor) -> Tensor:
    """Four times as high and wide: each pixel takes from its two nearest centres along a side, the nearer the more."""

    def weights(size: int) -> Tensor:  # (4 size, size)
        centres = ((torch.arange(4 * size) + 0.5) / 4 - 0.5).clamp(0, size - 1)
        return (1 - (centres[:, None] - torch.arange(size)).abs()).clamp_min(0)

    return weights(small.shape[2]) @ small @ weights(small.shape[3]).T


@pytest.mark.parametrize(("latent_downscale", "with_latent"), [(1, False), (4, True), (4, False), (2, True)], ids=str)
def test_the_chain(folder: Path, latent_downscale: int, with_latent: bool) -> None:
    """The latent itself where it is a quarter as large, else block means; nothing is clamped before the networks."""
    enhancer = GAN(folder, chunk_size=2)
    assert enhancer.kernel.shape == (5, 5)
    images, labels = torch.rand(3, 3, 32, 64), torch.tensor([0, 4, 1])
    latent = 0.5 + torch.randn(3, 3, 32 // latent_downscale, 64 // latent_downscale) if with_latent else None
    given = Reconstruction(images, labels, latent_downscale, latent)
    enhanced = enhancer.enhance(given, seed=0)
    small = latent if with_latent and latent_downscale == 4 else images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-2, -1))
    half = enhancer.generator(linearly_enlarged(small), labels)
    other = enhancer.usrnet(enhancer.denoiser(small), enhancer.kernel, 4, 0.01)
    torch.testing.assert_close(enhanced, (0.5 * half + 0.5 * other).clamp(0, 1), rtol=1e-4, atol=1e-5)
    part = enhancer.enhance(given.part(torch.tensor([2, 0])), seed=0)
    torch.testing.assert_close(part, enhanced[[2, 0]], rtol=1e-4, atol=1e-5)


def test_the_chain_takes_labels_grey_images_and_none(folder: Path) -> None:
    enhancer = GAN(folder)
    images, labels = torch.rand(3, 3, 32, 64), torch.tensor([0, 4, 1])
    enhanced = enhancer.enhance(Reconstruction(images, labels), seed=0)
    assert not torch.allclose(enhanced, enhancer.enhance(Reconstruction(images, labels.flip(0)), seed=0))
    assert enhancer.enhance(Reconstruction(images[:, :1], labels), seed=0).shape == (3, 1, 32, 64)
    assert enhancer.enhance(Reconstruction(images[:0], labels[:0]), seed=0).shape == (0, 3, 32, 64)


def test_what_the_chain_refuses(folder: Path) -> None:
    enhancer = GAN(folder)
    with pytest.raises(SettingError, match="multiples of 32 pixels, but these are 48x48"):
        enhancer.enhance(Reconstruction(torch.rand(1, 3, 48, 48), torch.tensor([0])), seed=0)
    with pytest.raises(SettingError, match="attacked model has 10 classes, but ROG's generator has ImageNet's 5"):
        enhancer.check((3, 32, 32), 10)
    with pytest.raises(SettingError, match="GAN enhances RGB or grey images, but these have 2 channels"):
        enhancer.check((2, 32, 32), None)
    enhancer.check((1, 32, 32), 5)
    with pytest.raises(SettingError, match="labels 0 to 4, but labels run from 5 to 5"):
        enhancer.enhance(Reconstruction(torch.rand(1, 3, 32, 32), torch.tensor([5])), seed=0)
    (folder / "kernels_bicubicx234.mat").write_bytes(b"no kernels")
    with pytest.raises(StorageError, match="does not hold blur kernels"):
        GAN(folder)
    torch.save({"gen_state_dict": gan.Generator().state_dict()}, folder / "denoiser.pth")
    with pytest.raises(StorageError, match=r"denoiser.pth' does not fit RogDenoiser .*Conv1.conv.bias is unknown"):
        GAN(folder)
    (folder / "postmodel.pth").unlink()
    with pytest.raises(MissingFile, match=r"no weights at .*postmodel.pth'. Get them from the model zoo of ROG"):
        GAN(folder)


def test_any_restoration_network(tmp_path: Path) -> None:
    reason = "needs the optional package spandrel"
    compact = pytest.importorskip("spandrel.architectures.Compact.__arch.SRVGG", reason=reason)
    torch.manual_seed(0)
    network = compact.SRVGGNetCompact(num_feat=8, num_conv=2, upscale=2)
    torch.save({"params": network.state_dict()}, tmp_path / "x2.pth")
    enhancer = Restoration(tmp_path / "x2.pth")
    images = torch.rand(2, 3, 16, 16)
    enhanced = enhancer.enhance(Reconstruction(images, torch.zeros(2)), seed=0)
    assert enhanced.shape == images.shape
    upsampled = enhancer.enhance(Reconstruction(images, torch.zeros(2), latent_downscale=4), seed=0)
    torch.testing.assert_close(upsampled, network(F.avg_pool2d(images, 2)).clamp(0, 1).detach())
    assert enhancer.enhance(Reconstruction(images[:, :1], torch.zeros(2)), seed=0).shape == (2, 1, 16, 16)
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(StorageError, match="holds no network that spandrel supports"):
        Restoration(tmp_path / "foreign.pth")


def doubling(input_channels: int, output_channels: int) -> type:
    """A package like spandrel, for a network that repeats every pixel."""

    class Doubling(nn.Upsample):
        def __init__(self) -> None:
            super().__init__(scale_factor=2)
            self.scale, self.input_channels, self.output_channels = 2, input_channels, output_channels

    loader = SimpleNamespace(load_from_state_dict=lambda state: Doubling())
    return SimpleNamespace(ImageModelDescriptor=Doubling, ModelLoader=lambda device: loader)


@pytest.mark.parametrize("shape", [(16, 16), (15, 16), (16, 15), (15, 15)])
def test_images_are_reduced_before_restoration_if_both_sides_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spandrel", doubling(3, 3))
    torch.save({"a": torch.zeros(1)}, tmp_path / "x2.pth")
    images = torch.rand(2, 3, *shape)
    restored = Restoration(tmp_path / "x2.pth").enhance(Reconstruction(images, torch.zeros(2), 4), seed=0)
    if shape == (16, 16):
        expected = images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    else:  # doubled and halved
        doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = F.interpolate(doubled, shape, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(restored, expected)


@pytest.mark.parametrize("channels", [(4, 3), (3, 4)])
def test_networks_of_other_channels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: tuple[int, int]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spandrel", doubling(*channels))
    torch.save({"a": torch.zeros(1)}, tmp_path / "x2.pth")
    with pytest.raises(SettingError, match=f"from {channels[0]} to {channels[1]} channels, but"):
        Restoration(tmp_path / "x2.pth")


def test_without_spandrel_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spandrel", None)
    with pytest.raises(SettingError, match=r"not installed. Run `pip install"):
        Restoration(tmp_path / "x2.pth")
