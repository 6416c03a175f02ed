"""ROG's class-conditional generator and denoiser, with the tensor names of the released state dicts."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES = 1000


class ClassBatchNorm(nn.Module):
    """BatchNorm with stored statistics and class-conditional gain and bias."""

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
    """Convolution, InstanceNorm, ReLU; for a 5x5 kernel, the caller pads the input."""

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
    """Transposed convolution, ReLU.

    The BatchNorm is part of the released state dict, but the original implementation discards its output.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.convT = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.bn = ClassBatchNorm(channels, num_classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.relu(self.convT(x))


class ConvolutionBlock(nn.Module):
    """`Convolution` with the tensor names of the denoiser's state dict."""

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
    """U-Net: four encoder convolutions, three transposed convolutions, skip connections at equal resolution."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images to images of the same size.

        Args:
            x: (N, 3, H, W) in [0, 1], H and W multiples of 8.
            labels: (N,) long; not used by the denoiser.

        Returns:
            (N, 3, H, W) in [0, 1].
        """
        x1 = self.Conv1(F.pad(x, (2, 2, 2, 2), mode="reflect"), labels)
        x2 = self.Conv2(x1, labels)
        x3 = self.Conv3(x2, labels)
        x4 = self.Conv4(x3, labels)
        up = torch.cat([self.Conv5(self.ConvT1(x4, labels), labels), x3], dim=1)
        up = torch.cat([self.Conv6(self.ConvT2(up, labels), labels), x2], dim=1)
        up = torch.cat([self.Conv7(self.ConvT3(up, labels), labels), x1], dim=1)
        return (self.Conv9(torch.cat([self.Conv8(up), x], dim=1)).tanh() + 1) / 2


class Generator(EncoderDecoder):
    """ROG's class-conditional generator; the released weights have `width=64` and 1000 classes."""

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
    """ROG's denoiser; the released weights have `width=64`."""

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
