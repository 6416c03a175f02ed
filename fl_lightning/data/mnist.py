"""MNIST and Fashion-MNIST."""

from PIL import Image, ImageOps
from torchvision import datasets

from fl_lightning.data.catalogue import Catalogue
from fl_lightning.data.downloadable import DownloadableData
from fl_lightning.data.images import to_pixels


class MNIST(DownloadableData):
    """Handwritten digits, grey, padded from 28x28 to 32x32 pixels (`image_size` resizes them after that)."""

    channels = 1
    source = datasets.MNIST

    def catalogue(self) -> Catalogue:
        return self._split(train=True)

    def test_catalogue(self) -> Catalogue:
        return self._split(train=False)

    def _split(self, train: bool) -> Catalogue:
        split = self.from_torchvision(self.source, train)
        return Catalogue(
            labels=split.targets,
            class_names=split.classes,
            read=lambda index: to_pixels(
                ImageOps.expand(Image.fromarray(split.data[index].numpy()), border=2), self.image_size, self.channels
            ),
        )


class FashionMNIST(MNIST):
    """Articles of clothing, grey, padded from 28x28 to 32x32 pixels (`image_size` resizes them after that)."""

    source = datasets.FashionMNIST
