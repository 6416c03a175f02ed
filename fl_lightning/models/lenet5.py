"""LeNet5 of the paper (arXiv 2410.04661): two convolutions, two linear layers without bias."""

from collections.abc import Sequence

from torch import nn

from fl_lightning.models.classifier import ImageClassifier, ImageShape, feature_width


class LeNet5(ImageClassifier):
    """Two 5x5 convolutions (32, 64 channels) with 2x2 max pooling and ReLU, then two linear layers without bias.

    The first linear layer has 512 outputs and is followed by a ReLU.

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
        self.features = nn.Sequential(  # pooling before the ReLU gives the same result at a quarter of its cost
            nn.Conv2d(image_shape[0], 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(feature_width(self.features, image_shape), 512, bias=False),
            nn.ReLU(),
            nn.Linear(512, num_classes, bias=False),
        )
