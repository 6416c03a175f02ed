"""Direct enhancement around its samplers: sizes, chunks, seeds, and what it gains with a simple denoiser."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.diffusion.schedules import Karras, LinearBetas
from attack_modules.enhance.direct.ddrm import DDRM
from attack_modules.enhance.direct.diffpir import DiffPIR
from attack_modules.enhance.direct.enhancer import DirectEnhancement
from attack_modules.enhance.direct.sampler import Denoise, Noise, Sampler
from fl_lightning.errors import SettingError


def spectrum(height: int, width: int) -> Tensor:
    """(H, W // 2 + 1) variances of Fourier coefficients, of smooth images."""
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2).sqrt()
    return 1e-5 / frequency.clamp_min(0.04).pow(4)


class SmoothDenoiser(Denoiser):
    """Exact for Gaussian images of the spectrum above: Wiener's filter."""

    sigma_min, sigma_max, multiple = 0.01, 10.0, 8

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        assert noisy.shape[1] == 3
        assert noisy.shape[2] % 8 == noisy.shape[3] % 8 == 0
        variances = spectrum(*noisy.shape[-2:])
        gain = variances / (variances + sigma.reshape(-1, 1, 1, 1) ** 2)
        return 0.5 + torch.fft.irfft2(gain * torch.fft.rfft2(noisy - 0.5), s=noisy.shape[-2:])


def reconstructed(
    count: int, size: int, latent_downscale: int, sigma: float, channels: int = 3
) -> tuple[Tensor, Reconstruction]:
    """Originals, and what an attack might make of them: noisy, and blurred if from a latent."""
    generator = torch.Generator().manual_seed(1)
    white = torch.randn(count, channels, size, size, generator=generator)
    originals = 0.5 + torch.fft.irfft2(spectrum(size, size).sqrt() * torch.fft.rfft2(white), s=(size, size))
    latent = F.avg_pool2d(originals, latent_downscale) if latent_downscale > 1 else originals
    latent = latent + sigma * torch.randn(latent.shape, generator=generator)
    images = F.interpolate(latent, scale_factor=latent_downscale, mode="bicubic") if latent_downscale > 1 else latent
    return originals, Reconstruction(images.clamp(0, 1), torch.arange(count), latent_downscale)


@pytest.mark.parametrize("sampler", [DDRM, DiffPIR])
@pytest.mark.parametrize(("latent_downscale", "left"), [(1, 0.3), (2, 0.6), (4, 0.95)])
def test_images_come_nearer_to_their_originals(sampler: type[Sampler], latent_downscale: int, left: float) -> None:
    originals, reconstruction = reconstructed(4, 48, latent_downscale, 0.1)
    enhanced = DirectEnhancement(SmoothDenoiser(), sampler()).enhance(reconstruction, seed=0)
    assert enhanced.min() >= 0
    assert enhanced.max() <= 1
    before = (reconstruction.images - originals).square().mean((1, 2, 3))
    after = (enhanced - originals).square().mean((1, 2, 3))
    assert (after < left * before).all()


@pytest.mark.parametrize(("channels", "size", "latent_downscale"), [(3, 20, 1), (1, 28, 4), (3, 12, 4), (1, 32, 1)])
def test_any_size_and_grey_images(channels: int, size: int, latent_downscale: int) -> None:
    _, reconstruction = reconstructed(2, size, latent_downscale, 0.05, channels)
    enhanced = DirectEnhancement(SmoothDenoiser(), schedule=Karras(2)).enhance(reconstruction, seed=0)
    assert enhanced.shape == reconstruction.images.shape
    assert enhanced.isfinite().all()


def test_no_image_is_no_error() -> None:
    nothing = Reconstruction(torch.zeros(0, 3, 16, 16), torch.zeros(0).long(), 4)
    assert DirectEnhancement(SmoothDenoiser()).enhance(nothing, seed=0).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("latent_downscale", [1, 4])
@pytest.mark.parametrize("window", [0, 5])
def test_chunks_change_nothing_and_seeds_do(latent_downscale: int, window: int) -> None:
    _, reconstruction = reconstructed(3, 16, latent_downscale, 0.05)

    def enhanced(chunk_size: int, seed: int) -> Tensor:
        enhancer = DirectEnhancement(
            SmoothDenoiser(), schedule=Karras(3), window=window, temperature=1.0, chunk_size=chunk_size
        )
        return enhancer.enhance(reconstruction, seed)

    torch.testing.assert_close(enhanced(16, 0), enhanced(1, 0), atol=1e-5, rtol=0)
    assert not torch.allclose(enhanced(16, 0), enhanced(16, 1), atol=1e-3)


def test_the_papers_setting_on_a_model_of_larger_images() -> None:
    _, reconstruction = reconstructed(1, 16, 4, 0.0)
    shapes = []

    class Spy(SmoothDenoiser):
        def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
            shapes.append(tuple(noisy.shape))
            return super().forward(noisy, sigma)

    enhancer = DirectEnhancement(Spy(), DDRM(), LinearBetas(50), sigma_0=0.05, magnify=2)
    assert enhancer.enhance(reconstruction, seed=0).shape == (1, 3, 16, 16)
    assert shapes == [(1, 3, 32, 32)] * 50


def test_several_samples_differ_and_average_to_a_nearer_image() -> None:
    originals, reconstruction = reconstructed(4, 32, 4, 0.1)

    def error(samples: int) -> Tensor:
        enhancer = DirectEnhancement(SmoothDenoiser(), DDRM(), Karras(4), temperature=1.0, samples=samples)
        return (enhancer.enhance(reconstruction, seed=0) - originals).square().mean((1, 2, 3))

    assert (error(4) < 0.95 * error(1)).all()


@pytest.mark.parametrize("magnify", [1, 2])
def test_samples_are_clamped_at_the_models_size_before_they_are_averaged(magnify: int) -> None:
    class Extreme(Sampler):
        """Pixel after pixel along a row -1, 0.5, 2, 0.5; the other way round in every second sample."""

        calls = 0

        def __call__(
            self, denoise: Denoise, means: Tensor, sigma_y: Tensor, sigmas: Tensor, start: Tensor, noise: Noise
        ) -> Tensor:
            self.calls += 1
            row = torch.tensor([-1.0, 0.5, 2.0, 0.5]).repeat(start.shape[-1] // 4)
            return (row.flip(0) if self.calls % 2 == 0 else row).expand(start.shape)

    _, reconstruction = reconstructed(1, 16, 1, 0.0)

    def row(samples: int) -> list[float]:
        enhancer = DirectEnhancement(
            SmoothDenoiser(), Extreme(), sigma_0=0.0, temperature=1.0, samples=samples, magnify=magnify
        )
        return enhancer.enhance(reconstruction, seed=0)[0, 0, 0, :4].tolist()

    assert row(1) == ([0.0, 0.5, 1.0, 0.5] if magnify == 1 else [0.25, 0.75, 0.25, 0.75])
    assert row(2) == ([0.25, 0.75, 0.75, 0.25] if magnify == 1 else [0.5, 0.5, 0.5, 0.5])


def test_schedules_fall_within_what_the_denoiser_knows() -> None:
    sigmas = Karras(steps=5, first=100.0, last=1e-4)(SmoothDenoiser())
    assert (sigmas.diff() < 0).all()
    assert sigmas[[0, -1]].tolist() == pytest.approx([10.0, 0.01])
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    expected = ((1 - alpha_bar[20]) / alpha_bar[20]).sqrt().item() / 2
    assert LinearBetas(50)(SmoothDenoiser())[-2].item() == pytest.approx(expected, rel=1e-4)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingError, match=r"temperature in \[0, 1\]"):
        DirectEnhancement(SmoothDenoiser(), temperature=1.5)
    with pytest.raises(SettingError, match="samples=0"):
        DirectEnhancement(SmoothDenoiser(), samples=0)
    with pytest.raises(SettingError, match=r"samples` is 4, but at `postprocess.temperature` 0 all samples are equal"):
        DirectEnhancement(SmoothDenoiser(), samples=4)
    with pytest.raises(SettingError, match="DirectEnhancement enhances RGB or grey images, but these have 4 channels"):
        DirectEnhancement(SmoothDenoiser()).check((4, 16, 16), None)
    with pytest.raises(SettingError, match="window` is 4"):
        DirectEnhancement(SmoothDenoiser(), window=4)
    with pytest.raises(SettingError, match="falls from `first`"):
        Karras(first=0.1, last=0.2)
    with pytest.raises(SettingError, match="does not divide 1000"):
        LinearBetas(30)
