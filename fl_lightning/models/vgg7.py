"""VGG7 as used by the paper (arXiv 2410.04661): three pairs of convolutions, two linear layers without bias."""

from collections.abc import Sequence

from torch import nn

from fl_lightning.models.classifier import ImageClassifier, ImageShape, feature_width


class VGG7(ImageClassifier):
    """3x3 convolutions (128, 128, 256, 256, 512, 512) with ReLU, 2x2 max pooling after each pair; linear to 1024.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of an image.
        mean, std: normalisation of the input, see `ImageClassifier`.
    """

    def __init__(
        self, num_classes: int, image_shape: ImageShape, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ) -> None:
        super().__init__(mean, std)
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for width in (128, 256, 512):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            # ReLU of the largest is the largest ReLU, for a quarter of the work.
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(
            nn.Linear(feature_width(self.features, image_shape), 1024, bias=False),
            nn.ReLU(),
            nn.Linear(1024, num_classes, bias=False),
        )
