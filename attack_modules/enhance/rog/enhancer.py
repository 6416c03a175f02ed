"""The GAN enhancement of ROG (Yue et al. 2023, USENIX Security), with which the paper compares; and any other network.

Names and shapes of the modules are those of ROG's released files, which load strictly.
"""

from pathlib import Path

import torch
from scipy.io import loadmat
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.weights import load_strictly, read_weights
from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.storage import StorageError

FACTOR = 4
"""How much smaller than the image ROG's reconstructions are."""
MULTIPLE = 8 * FACTOR
"""Both sides of an image must be multiples of it: the networks halve the small one three times."""
NOISE = 0.01
"""Standard deviation of the noise that USRNet is told, of pixels in [0, 1]."""
ITERATIONS = 8
"""Of USRNet's alternation of data step and prior step."""
NUM_CLASSES = 1000
MODEL_ZOO = "the model zoo of ROG's authors"


class ClassBatchNorm(nn.Module):
    """BatchNorm of stored statistics whose gain and bias are the class's."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.gain = nn.Embedding(num_classes, channels)
        self.bias = nn.Embedding(num_classes, channels)
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = F.batch_norm(x, self.stored_mean, self.stored_var, eps=1e-5)
        return x * (1 + self.gain(labels))[:, :, None, None] + self.bias(labels)[:, :, None, None]


class Convolution(nn.Module):
    """Convolution, InstanceNorm, ReLU; the input is padded beforehand where the kernel is 5x5."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding=1 if kernel == 3 else 0)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.relu(F.instance_norm(self.conv(x)))


class ClassConvolution(nn.Module):
    """Convolution, class-conditional BatchNorm, ReLU."""

    def __init__(self, channels: int, out: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1)
        self.bn = ClassBatchNorm(out, num_classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x), labels))


class ClassTransposed(nn.Module):
    """Transposed convolution, ReLU; its BatchNorm is in the file, but the original does not use what comes of it."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.convT = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.bn = ClassBatchNorm(channels, num_classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.relu(self.convT(x))


class ConvolutionBlock(nn.Module):
    """`Convolution` under the names of the denoiser's file."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, out, kernel, stride, padding=1 if kernel == 3 else 0)
        self.conv_block = nn.Sequential(convolution, nn.InstanceNorm2d(out), nn.ReLU())

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.conv_block(x)


class TransposedBlock(nn.Module):
    """Transposed convolution, InstanceNorm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolution = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.convT_block = nn.Sequential(convolution, nn.InstanceNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.convT_block(x)


class EncoderDecoder(nn.Module):
    """Four convolutions down, three transposed ones up, each step up given the encoder's step of its size."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) in [0, 1], H and W multiples of 8, and (N,) long -> (N, 3, H, W) in [0, 1]."""
        x1 = self.Conv1(F.pad(x, (2, 2, 2, 2), mode="reflect"), labels)
        x2 = self.Conv2(x1, labels)
        x3 = self.Conv3(x2, labels)
        x4 = self.Conv4(x3, labels)
        up = torch.cat([self.Conv5(self.ConvT1(x4, labels), labels), x3], dim=1)
        up = torch.cat([self.Conv6(self.ConvT2(up, labels), labels), x2], dim=1)
        up = torch.cat([self.Conv7(self.ConvT3(up, labels), labels), x1], dim=1)
        return (self.Conv9(torch.cat([self.Conv8(up), x], dim=1)).tanh() + 1) / 2


class Generator(EncoderDecoder):
    """ROG's class-conditional generator; the file's is `width=64` and has 1000 classes."""

    def __init__(self, width: int = 64, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        w = width
        self.Conv1 = Convolution(3, w, kernel=5)
        self.Conv2 = Convolution(w, 2 * w, stride=2)
        self.Conv3 = Convolution(2 * w, 4 * w, stride=2)
        self.Conv4 = Convolution(4 * w, 8 * w, stride=2)
        self.ConvT1 = ClassTransposed(8 * w, num_classes)
        self.Conv5 = ClassConvolution(8 * w, 8 * w, num_classes)
        self.ConvT2 = ClassTransposed(12 * w, num_classes)
        self.Conv6 = ClassConvolution(12 * w, 4 * w, num_classes)
        self.ConvT3 = ClassTransposed(6 * w, num_classes)
        self.Conv7 = ClassConvolution(6 * w, 2 * w, num_classes)
        self.Conv8 = nn.Conv2d(3 * w, w, 3, padding=1)
        self.Conv9 = nn.Conv2d(w + 3, 3, 3, padding=1)


class RogDenoiser(EncoderDecoder):
    """ROG's denoiser; the file's is `width=64`."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.Conv1 = ConvolutionBlock(3, w, kernel=5)
        self.Conv2 = ConvolutionBlock(w, 2 * w, stride=2)
        self.Conv3 = ConvolutionBlock(2 * w, 4 * w, stride=2)
        self.Conv4 = ConvolutionBlock(4 * w, 8 * w, stride=2)
        self.ConvT1 = TransposedBlock(8 * w)
        self.Conv5 = ConvolutionBlock(8 * w, 8 * w)
        self.ConvT2 = TransposedBlock(12 * w)
        self.Conv6 = ConvolutionBlock(12 * w, 4 * w)
        self.ConvT3 = TransposedBlock(6 * w)
        self.Conv7 = ConvolutionBlock(6 * w, 2 * w)
        self.Conv8 = nn.Conv2d(3 * w, w, 3, padding=1)
        self.Conv9 = nn.Conv2d(w + 3, 3, 3, padding=1)


class ResidualBlock(nn.Module):
    """Two convolutions without biases beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res(x)


class ResUNet(nn.Module):
    """USRNet's prior step: (N, 4, H, W) estimate and noise map -> (N, 3, H, W)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def down(channels: int) -> nn.Sequential:
            halving = nn.Conv2d(channels, 2 * channels, 2, stride=2, bias=False)
            return nn.Sequential(ResidualBlock(channels), ResidualBlock(channels), halving)

        def up(channels: int) -> nn.Sequential:
            doubling = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2, bias=False)
            return nn.Sequential(doubling, ResidualBlock(channels), ResidualBlock(channels))

        self.m_head = nn.Conv2d(4, width, 3, padding=1, bias=False)
        self.m_down1, self.m_down2, self.m_down3 = down(width), down(2 * width), down(4 * width)
        self.m_body = nn.Sequential(ResidualBlock(8 * width), ResidualBlock(8 * width))
        self.m_up3, self.m_up2, self.m_up1 = up(4 * width), up(2 * width), up(width)
        self.m_tail = nn.Conv2d(width, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x1 = self.m_head(F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate"))
        x2 = self.m_down1(x1)
        x3 = self.m_down2(x2)
        x4 = self.m_down3(x3)
        x = self.m_up3(self.m_body(x4) + x4)
        x = self.m_up1(self.m_up2(x + x3) + x2)
        return self.m_tail(x + x1)[..., :height, :width]


class HyperParameters(nn.Module):
    """USRNet's alpha and beta of each iteration: (N, 2) noise and factor -> (N, 16), positive."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(2, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 2 * ITERATIONS, 1),
            nn.Softplus(),
        )

    def forward(self, told: Tensor) -> Tensor:
        return self.mlp(told[:, :, None, None])[:, :, 0, 0] + 1e-6


class USRNet(nn.Module):
    """Unfolded super-resolution under a known blur (Zhang et al. 2020, arXiv 2003.10428)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.p = ResUNet(width)
        self.h = HyperParameters()

    def forward(self, small: Tensor, kernel: Tensor, factor: int, noise: float) -> Tensor:
        """Super-resolution of `small = (image * kernel)[every factor-th pixel] + noise`.

        Args:
            small: (N, 3, h, w) in [0, 1].
            kernel: (k, k) blur at the resolution of the result, of sum 1.
            factor: by which both sides grow.
            noise: standard deviation, of pixels in [0, 1].

        Returns:
            (N, 3, factor h, factor w), not clamped.
        """
        told = small.new_tensor([noise, factor]).expand(len(small), 2)
        alphas, betas = self.h(told)[:, :, None, None, None].chunk(2, dim=1)  # (N, 8, 1, 1, 1)
        estimate = F.interpolate(small, scale_factor=factor, mode="nearest")
        for iteration in range(ITERATIONS):
            estimate = data_step(estimate, small, kernel, factor, alphas[:, iteration])
            noise_map = betas[:, iteration].expand(-1, 1, *estimate.shape[-2:])
            estimate = self.p(torch.cat([estimate, noise_map], dim=1))
        return estimate


def data_step(estimate: Tensor, small: Tensor, kernel: Tensor, factor: int, alpha: Tensor) -> Tensor:
    """The x that minimises `|(x * kernel)[every factor-th pixel] - small|^2 + alpha |x - estimate|^2`.

    In closed form by FFT, since blur and sampling are circulant (arXiv 2003.10428, equation 7).

    Args:
        estimate: (N, C, factor h, factor w).
        small: (N, C, h, w).
        kernel: (k, k).
        factor: of the sampling.
        alpha: (N, 1, 1, 1) > 0.
    """
    shape = estimate.shape[-2:]
    placed = F.pad(kernel, (0, shape[1] - kernel.shape[1], 0, shape[0] - kernel.shape[0]))
    blur = torch.fft.fft2(placed.roll((-(kernel.shape[0] // 2), -(kernel.shape[1] // 2)), (0, 1)))
    spread = torch.zeros_like(estimate)
    spread[..., ::factor, ::factor] = small
    right = blur.conj() * torch.fft.fft2(spread) + torch.fft.fft2(alpha * estimate)

    def folded(spectrum: Tensor) -> Tensor:
        """The mean of what aliases to the same frequency of the small image."""
        h, w = small.shape[-2:]
        return spectrum.unflatten(-1, (factor, w)).unflatten(-3, (factor, h)).mean((-4, -2))

    aliased = folded(blur * right) / (folded(blur.abs().square()) + alpha)
    return torch.fft.ifft2((right - blur.conj() * aliased.tile(1, 1, factor, factor)) / alpha).real


class GAN(Enhancer):
    """ROG's postprocessing: half a class-conditional generator, half denoiser and super-resolution.

    It was made for reconstructions a quarter as large as the image, so images are reduced to that first, whatever finer
    detail they show.

    Args:
        folder: holds `postmodel.pth`, `denoiser.pth`, `usrgan.pth` and `kernels_bicubicx234.mat`.
        chunk_size: images that are enhanced at once, which bounds memory.

    Raises:
        MissingFile: a file is not there.
        StorageError: one does not fit.
    """

    def __init__(self, folder: Path = CHECKPOINTS / "rog", chunk_size: int = 16) -> None:
        folder = Path(folder)
        with torch.device("meta"):  # no random weights where others are to come
            self.generator, self.denoiser, self.usrnet = Generator(), RogDenoiser(), USRNet()
        for network, name, parts in (
            (self.generator, "postmodel.pth", ("gen_state_dict",)),
            (self.denoiser, "denoiser.pth", ("gen_state_dict",)),
            (self.usrnet, "usrgan.pth", ()),
        ):
            load_strictly(network, read_weights(folder / name, MODEL_ZOO, parts), folder / name)
            network.eval().requires_grad_(False)
        self.kernel = read_kernel(folder / "kernels_bicubicx234.mat", FACTOR)
        self.chunk_size = chunk_size

    @torch.no_grad()
    def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
        images, labels = reconstruction.images, reconstruction.labels
        if images.shape[2] % MULTIPLE or images.shape[3] % MULTIPLE:
            raise SettingError(
                f"ROG's networks take images whose sides are multiples of {MULTIPLE} pixels, but these are "
                f"{images.shape[2]}x{images.shape[3]}. Attack images of 128x128, for which they were made."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < NUM_CLASSES:
            raise SettingError(
                f"ROG's generator knows ImageNet's labels 0 to {NUM_CLASSES - 1}, but labels run from "
                f"{int(labels.min())} to {int(labels.max())}. Leave the GAN out for other classes."
            )
        for network in (self.generator, self.denoiser, self.usrnet):
            network.to(images.device)
        chunks = [torch.zeros_like(images[:0])]
        for part, classes in zip(images.split(self.chunk_size), labels.split(self.chunk_size), strict=True):
            if len(part):
                chunks.append(self._chain(part.expand(-1, 3, -1, -1), classes.to(images.device)))
        enhanced = torch.cat([chunk.to(images) for chunk in chunks[1:]] or chunks)
        return enhanced if images.shape[1] == 3 else enhanced.mean(1, keepdim=True)

    def _chain(self, images: Tensor, labels: Tensor) -> Tensor:
        small = F.avg_pool2d(images, FACTOR)
        enlarged = F.interpolate(small, scale_factor=FACTOR, mode="bicubic").clamp(0, 1)
        generated = self.generator(enlarged, labels)
        sharpened = self.usrnet(self.denoiser(small), self.kernel.to(images), FACTOR, NOISE)
        return (0.5 * generated + 0.5 * sharpened).clamp(0, 1)


def read_kernel(path: Path, factor: int) -> Tensor:
    """(k, k) the blur kernel for a factor of 2, 3 or 4 in ROG's MATLAB file.

    Raises:
        MissingFile: it is not there.
        StorageError: it is another file.
    """
    if not path.is_file():
        raise MissingFile(f"There are no kernels at '{path}'. Get them from {MODEL_ZOO}, and put them there.")
    try:
        kernel = loadmat(path)["kernels"][0, factor - 2]
        return torch.tensor(kernel.astype("float32"))
    except Exception as error:  # a foreign file makes scipy raise nearly anything
        raise StorageError(
            f"'{path}' does not hold blur kernels, a MATLAB variable `kernels` ({type(error).__name__}: {error}). "
            f"Get it anew from {MODEL_ZOO}."
        ) from error
