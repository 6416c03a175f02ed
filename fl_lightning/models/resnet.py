"""ResNets without BatchNorm, as in the paper (arXiv 2410.04661)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fl_lightning.models.classifier import ImageClassifier, ImageShape, feature_width


class BasicBlock(nn.Module):
    """Residual block: two 3x3 convolutions and a shortcut, without biases and without normalisation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class _ResNet(ImageClassifier):
    """7x7 stride-2 convolution to 64 channels, stages of 64, 128, 256 and 512, average pooling to 8x8, linear head."""

    blocks_per_stage: int
    """Number of basic blocks in each of the four stages."""

    def __init__(
        self, num_classes: int, image_shape: ImageShape, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ) -> None:
        super().__init__(mean, std)
        self.save_hyperparameters()
        layers: list[nn.Module] = [nn.Conv2d(image_shape[0], 64, 7, stride=2, padding=3, bias=False), nn.ReLU()]
        in_channels = 64
        for stage, channels in enumerate((64, 128, 256, 512)):
            for block in range(self.blocks_per_stage):
                layers.append(BasicBlock(in_channels, channels, stride=2 if stage and not block else 1))
                in_channels = channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(8), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(feature_width(self.features, image_shape), num_classes, bias=False))


class ResNet9(_ResNet):
    """A ResNet of one basic block per stage.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of an image.
        mean, std: normalisation of the input, see `ImageClassifier`.
    """

    blocks_per_stage = 1


class ResNet18(_ResNet):
    """A ResNet of two basic blocks per stage.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of an image.
        mean, std: normalisation of the input, see `ImageClassifier`.
    """

    blocks_per_stage = 2
