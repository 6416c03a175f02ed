"""MNIST and Fashion-MNIST."""

from PIL import Image, ImageOps
from torchvision import datasets

from fl_lightning.data.catalogue import Catalogue
from fl_lightning.data.downloadable import DownloadableData
from fl_lightning.data.images import to_pixels
from fl_lightning.errors import SettingError


class MNIST(DownloadableData):
    """MNIST: greyscale handwritten digits, padded from 28x28 to 32x32 pixels before resizing to `image_size`."""

    own_channels = 1
    source = datasets.MNIST

    def catalogue(self) -> Catalogue:
        return self._split(train=True)

    def test_catalogue(self) -> Catalogue:
        return self._split(train=False)

    def _split(self, train: bool) -> Catalogue:
        split = self.from_torchvision(self.source, train)
        images, labels = len(split.data), split.targets
        if images != len(labels) or images == 0 or labels.max() >= len(split.classes):  # torchvision does not compare
            raise SettingError(
                f"The files of {self.source.__name__} in '{self.root}' are damaged: {images} images have "
                f"{len(labels)} labels, of classes {sorted(labels.unique().tolist())}. Delete them and set "
                "`data.download: true`."
            )
        return Catalogue(
            labels=split.targets,
            class_names=split.classes,
            read=lambda index: to_pixels(
                ImageOps.expand(Image.fromarray(split.data[index].numpy()), border=2), self.image_size, self.channels
            ),
            source=f"{self.source.__name__}, {'training' if train else 'test'} image {{}}".format,
        )


class FashionMNIST(MNIST):
    """Fashion-MNIST: greyscale clothing items, padded from 28x28 to 32x32 pixels before resizing to `image_size`."""

    source = datasets.FashionMNIST
