"""CIFAR-10, read from any of three file layouts."""

import os
import tarfile
from io import BytesIO
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torchvision import datasets

from fl_lightning.data.catalogue import Catalogue, label_indices
from fl_lightning.data.downloadable import DownloadableData
from fl_lightning.data.image_folder import folder_catalogue
from fl_lightning.data.images import is_image_name, read_image, readable_name, to_pixels
from fl_lightning.errors import MissingFile, SettingError, in_short
from fl_lightning.models.classifier import ImageShape


class CIFAR10(DownloadableData):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Args:
        root: a folder with `train/<class>/*.jpg` and `test/<class>/*.jpg`, or a `.tar.gz` of these, or a folder in
            torchvision's own layout.
        download: whether torchvision downloads the dataset to `root` if it is missing.
    """

    def catalogue(self) -> Catalogue:
        return self._split("train")

    def test_catalogue(self) -> Catalogue:
        return self._split("test")

    def _split(self, split: str) -> Catalogue:
        if os.path.isfile(self.root):
            return tar_catalogue(self.root, split, self.image_shape)
        if os.path.isdir(self.root / split):
            return folder_catalogue(self.root / split, self.image_shape)
        for other in ("train", "test"):
            if os.path.isdir(self.root / other):
                raise MissingFile(
                    f"'{self.root}' has a folder '{other}', but none '{split}'. Add it, or use the images in '{other}' "
                    f"alone by `--data ImageFolder --data.root {self.root / other}`."
                )
        batches = self.from_torchvision(datasets.CIFAR10, train=split == "train")
        return Catalogue(
            labels=torch.tensor(batches.targets),
            class_names=batches.classes,
            read=lambda index: to_pixels(Image.fromarray(batches.data[index]), self.image_size, self.channels),
            source=f"CIFAR-10, {split} image {{}}".format,
        )


class CIFAR10Test(CIFAR10):
    """The test images of `CIFAR10` as the clients' data, unseen by models trained on CIFAR-10's training images."""

    def catalogue(self) -> Catalogue:
        return self._split("test")

    def test_catalogue(self) -> None:
        return None


def tar_catalogue(tar_path: Path, split: str, image_shape: ImageShape) -> Catalogue:
    """Index the images at `<split>/<class>/<name>` in a tar file.

    The encoded images are kept in memory; nothing is extracted to disk.

    Raises:
        SettingError: the tar file is unreadable or truncated, or contains no such images.
    """
    content: dict[tuple[str, str], bytes] = {}
    try:
        if not tarfile.is_tarfile(tar_path):  # `open` tells at length what it is not
            raise tarfile.ReadError("it is none, or damaged")
        with tarfile.open(tar_path) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if member.isfile() and parts[-3:-2] == (split,) and is_image_name(parts[-1]):
                    content[parts[-2], parts[-1]] = tar.extractfile(member).read()
    except Exception as error:  # for damaged files the decompressors raise many exception types
        raise SettingError(
            f"'{tar_path}' cannot be read as a tar file ({in_short(error)}). Download it again, or set "
            "`data.root` to a folder."
        ) from error
    if not content:
        raise SettingError(
            f"'{tar_path}' has no images at {split}/<class>/<name>.jpg. Set `data.root` to a tar file that has."
        )
    channels, image_size, _ = image_shape
    names = sorted(content)
    class_names = sorted({class_name for class_name, _ in names})

    def source(index: int) -> str:
        return readable_name(f"{tar_path}:{split}/{'/'.join(names[index])}")

    return Catalogue(
        labels=label_indices([class_name for class_name, _ in names], class_names),
        class_names=[readable_name(name) for name in class_names],
        read=lambda index: read_image(BytesIO(content[names[index]]), image_size, channels, name=source(index)),
        source=source,
    )
