"""Base class of the federated datasets."""

import hashlib
import re
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from fl_lightning.data.catalogue import Catalogue, first_of
from fl_lightning.data.images import ImageSet, PathLike, pool
from fl_lightning.data.manifest import read_manifest
from fl_lightning.data.partition import InOrder, Partition, even_sizes, refuse_too_few
from fl_lightning.errors import SettingError
from fl_lightning.models.classifier import ImageShape

MOST_PIXELS = 4096
MOST_CLASSES = 10_000_000
"""Limits far beyond what can be attacked, so that a slip is refused instead of exhausting the memory."""


class FederatedData(LightningDataModule, ABC):
    """A dataset partitioned among the clients of a federation, the last of which is the attacker.

    A subclass lists the available images in `catalogue`; only images that are assigned to a client are read. With
    `csv`, the images listed there replace the dataset's. If that file has a column `client`, this column determines
    the partition, and `num_clients`, `images_per_client`, `attacker_images` and `partition` have no effect.

    Args:
        num_clients: number of clients, the attacker included; the attacker is the last client.
        images_per_client: one number for all clients, or a list with one number per client; null: all images are
            distributed.
        attacker_images: the attacker's number of images, if it differs; 0: an attacker without data.
        image_size: height and width in pixels to which images are cropped and resized, from 8 to 4096.
        channels: 1 to read images as greyscale, 3 as RGB; null for the dataset's own: 1 of MNIST and Fashion-MNIST, 3
            of others, also where files are grey.
        partition: how the images are assigned to the clients.
        csv: a file that lists images to use instead of the dataset's. Its first line names the columns
            `path,label[,client][,person]` in any order and case, separated by commas, semicolons or tabs; a path may
            also be called file, filename, filepath, image or image_path, a label class, class_name, category or target,
            a person patient, patient_id or subject, and other columns are ignored. Persons are for the results alone,
            which then say what leaked of each. Paths are relative to the file, and no image is listed twice. Labels are
            all class indices, from 0, or all class names; `client` is a victim's number, from 0, or `attacker`. The
            encoding is UTF-8, or UTF-16 with a byte order mark.
        num_classes: number of classes, greater than every label; null: as many as the dataset has.
        seed: seeds every random choice of the partition; null for that of `seed_everything`.
        pooled_batch_size: batch size for training on the pooled images of all clients and for evaluating on the test
            set; the clients' own batch size is a setting of the federation.

    Raises:
        SettingError: a setting or a row of `csv` is invalid; the message names it.
    """

    own_channels: int = 3
    """Channels of the dataset's images: 3 for RGB, 1 for greyscale."""

    def __init__(
        self,
        num_clients: int = 5,
        images_per_client: int | list[int] | None = None,
        attacker_images: int | None = None,
        image_size: int = 128,
        channels: int | None = None,
        partition: Partition = InOrder(),  # noqa: B008 - it has no state
        csv: PathLike | None = None,
        num_classes: int | None = None,
        seed: int | None = None,
        pooled_batch_size: int = 128,
    ) -> None:
        super().__init__()
        _refuse_unfit(
            num_clients, images_per_client, attacker_images, image_size, channels, num_classes, pooled_batch_size
        )
        if seed is not None and not 0 <= seed < 2**32:
            raise SettingError(f"`data.seed` is {seed}, but seeds are whole numbers from 0 to {2**32 - 1}.")
        self._manifest = None if csv is None else read_manifest(csv, num_classes)
        dealt = self._manifest is not None and self._manifest.shares is not None
        self.num_clients = len(self._manifest.shares) if dealt else num_clients
        self.images_per_client = images_per_client
        self.attacker_images = attacker_images
        self.image_size = image_size
        self.channels = self.own_channels if channels is None else channels
        self.partition = partition
        self.seed = seed or 0
        self.pooled_batch_size = pooled_batch_size
        self._least_classes = num_classes

        self.clients: list[ImageSet] = []
        """Images of each client, the attacker's last; empty before `setup`."""
        self.class_names: list[str] = []
        """Name of each class; classes beyond the dataset's are named by their index. Empty before `setup`."""

    @abstractmethod
    def catalogue(self) -> Catalogue:
        """List the images that can be assigned to clients."""

    def test_catalogue(self) -> Catalogue | None:
        """List the images on which the global model is evaluated; None if there are none."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Partition the images and read those of the clients; repeated calls have no effect."""
        if self.clients:
            return
        catalogue = self.catalogue() if self._manifest is None else self._manifest.catalogue(self.image_shape)
        present = len(catalogue.class_names)
        highest = catalogue.labels.max().item()
        if self._least_classes is not None and self._least_classes <= highest:
            raise SettingError(
                f"`data.num_classes` is {self._least_classes}, but the images have labels up to {highest}. "
                f"Set it to at least {highest + 1}, or to null."
            )
        shares = self._shares(catalogue.labels)
        everybody = catalogue.read_all(torch.cat(shares), self.image_shape)
        starts = accumulate((len(share) for share in shares), initial=0)
        self.clients = [everybody.part(start, len(share)) for start, share in zip(starts, shares, strict=False)]
        num_classes = self._least_classes or present
        self.class_names = (catalogue.class_names + [str(i) for i in range(present, num_classes)])[:num_classes]

    def _shares(self, labels: Tensor) -> list[Tensor]:
        """Compute the partition: each client's images as indices into `labels`."""
        if self._manifest is not None and self._manifest.shares is not None:
            return self._manifest.shares
        refuse_too_few(labels, self.attacker, self.num_clients)  # every victim needs one
        sizes = self.images_per_client
        if isinstance(sizes, int):
            sizes = [sizes] * self.num_clients
        if self.attacker_images is not None:
            left = len(labels) - self.attacker_images
            if sizes is None and left < self.attacker:
                raise SettingError(
                    f"The attacker takes {self.attacker_images} of {len(labels)} images, which leaves too few for "
                    f"{self.attacker} victims. Lower `data.attacker_images` or provide more images."
                )
            victims = even_sizes(left, self.attacker) if sizes is None else sizes[:-1]
            sizes = [*victims, self.attacker_images]
        return self.partition(labels, sizes, self.num_clients, torch.Generator().manual_seed(self.seed))

    @property
    def attacker(self) -> int:
        """Index of the attacker among the clients."""
        return self.num_clients - 1

    @property
    def num_classes(self) -> int:
        """Number of classes, and thus of a model's logits; 0 before `setup`."""
        return len(self.class_names)

    @property
    def image_shape(self) -> ImageShape:
        """(C, H, W) of every image."""
        return self.channels, self.image_size, self.image_size

    @property
    def imagenet_labels(self) -> bool:
        """Whether class indices are those of ImageNet: 1000 classes named by synset, in sorted order."""
        names = self.class_names
        return (
            len(names) == 1000 and names == sorted(set(names)) and all(re.fullmatch(r"n\d{8}", name) for name in names)
        )

    @cached_property
    def test_set(self) -> ImageSet | None:
        """Images on which the global model is evaluated, read on first access; None if there are none.

        Raises:
            SettingError: after `setup`, if their classes are not those of the clients' images.
        """
        catalogue = self.test_catalogue() if self._manifest is None else None
        if catalogue is None:
            return None
        theirs, ours = catalogue.class_names, self.class_names
        common = min(len(theirs), len(ours))
        if ours and (theirs[:common] != ours[:common] or catalogue.labels.max() >= len(ours)):
            raise SettingError(
                f"The test images have {len(theirs)} classes ({first_of(theirs)}), the clients' images {len(ours)} "
                f"({first_of(ours)}). Give both the same classes, or set `data.num_classes` to at least {len(theirs)}."
            )
        return catalogue.read_all(torch.arange(len(catalogue.labels)), self.image_shape)

    def train_dataloader(self) -> DataLoader:
        """Provide the pooled images of all clients, shuffled, as for centralised training."""
        return pool(self.clients).dataloader(self.pooled_batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Provide the test set, or an empty list if there is none."""
        return self.test_set.dataloader(self.pooled_batch_size) if self.test_set else []

    def describe(self) -> dict[str, Any]:
        """Describe, in JSON types, all settings that determine the clients' images.

        Equal descriptions imply equal client datasets, as long as the files stay as they are: see `content`.
        """
        manifest = self._manifest
        return {
            "class": type(self).__name__,
            "num_clients": self.num_clients,
            "images_per_client": self.images_per_client,
            "attacker_images": self.attacker_images,
            "image_size": self.image_size,
            "channels": self.channels,
            "partition": {"class": type(self.partition).__name__, "args": dict(vars(self.partition))},
            "csv": None if manifest is None else {"path": str(manifest.csv.resolve()), "sha256": manifest.sha256},
            "num_classes": self._least_classes,
            "seed": self.seed,
        }

    @cached_property
    def content(self) -> str:
        """Hash of the clients' images and labels: files of the same names may have changed."""
        self.setup()
        digest = hashlib.sha256()
        for images in self.clients:
            digest.update(images.pixels.numpy().tobytes())
            digest.update(images.labels.numpy().tobytes())
        return digest.hexdigest()


def _refuse_unfit(
    num_clients: int,
    images_per_client: int | list[int] | None,
    attacker_images: int | None,
    image_size: int,
    channels: int | None,
    num_classes: int | None,
    pooled_batch_size: int,
) -> None:
    """Raise SettingError for numbers that are invalid for every dataset."""
    least = 2 if attacker_images == 0 else 1
    if num_clients < least:
        raise SettingError(
            f"`data.num_clients` is {num_clients}, but at least one client must hold images. Set it to at least "
            f"{least}, the attacker included."
        )
    if isinstance(images_per_client, list) and len(images_per_client) != num_clients:
        raise SettingError(
            f"`data.images_per_client` has {len(images_per_client)} numbers for {num_clients} clients. Give one number "
            "per client, the attacker's last, or a single number for all clients."
        )
    victims = images_per_client[:-1] if isinstance(images_per_client, list) else [images_per_client]
    if any(size is not None and size < 1 for size in victims):
        raise SettingError(
            f"`data.images_per_client` is {images_per_client}, but every victim needs at least one image. Only the "
            "attacker may have none (`data.attacker_images: 0`)."
        )
    own = images_per_client[-1] if isinstance(images_per_client, list) and attacker_images is None else attacker_images
    if own is not None and own < 0:
        raise SettingError(f"The attacker cannot have {own} images. Set `data.attacker_images` to 0 or more.")
    if not 8 <= image_size <= MOST_PIXELS:
        raise SettingError(
            f"`data.image_size` is {image_size}, but images need at least 8 and at most {MOST_PIXELS} pixels per side."
        )
    if channels not in (None, 1, 3):
        raise SettingError(
            f"`data.channels` is {channels}, but images are read as greyscale, with 1 channel, or as RGB, with 3. "
            "Set it to one of these, or to null for the dataset's own."
        )
    if num_classes is not None and not 1 <= num_classes <= MOST_CLASSES:
        raise SettingError(
            f"`data.num_classes` is {num_classes}. Set it to at least 1 and at most {MOST_CLASSES}, or null for the "
            "dataset's own."
        )
    if pooled_batch_size < 1:
        raise SettingError(f"`data.pooled_batch_size` is {pooled_batch_size}. Set it to at least 1.")
