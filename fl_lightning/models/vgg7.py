"""VGG7 of the paper (arXiv 2410.04661): three pairs of convolutions, two linear layers without bias."""

from collections.abc import Sequence

from torch import nn

from fl_lightning.models.classifier import ImageClassifier, ImageShape, feature_width


class VGG7(ImageClassifier):
    """Three pairs of 3x3 convolutions with ReLU and 2x2 max pooling per pair, then two linear layers without bias.

    The convolutions have 128, 128, 256, 256, 512 and 512 channels. The first linear layer has 1024 outputs and is
    followed by a ReLU.

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
            # Pooling before the ReLU gives the same result at a quarter of its cost.
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(
            nn.Linear(feature_width(self.features, image_shape), 1024, bias=False),
            nn.ReLU(),
            nn.Linear(1024, num_classes, bias=False),
        )
