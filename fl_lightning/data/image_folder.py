"""Image datasets with one folder per class."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from fl_lightning.data.catalogue import Catalogue, first_of
from fl_lightning.data.federated import FederatedData
from fl_lightning.data.images import IMAGE_SUFFIXES, PathLike, is_image_name, read_image, readable_name
from fl_lightning.data.partition import InOrder, Partition
from fl_lightning.errors import MissingFile, SettingError
from fl_lightning.models.classifier import ImageShape


class ImageFolder(FederatedData):
    """Images at `root/<class>/<name>.jpg` (or .png, .tif, ...), with classes and files in sorted order.

    Hidden files and what is no image by its name are skipped with a warning; a folder without images is a class still.

    Args:
        root: folder that contains one folder per class.
    """

    def __init__(
        self,
        root: PathLike,
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
        super().__init__(
            num_clients=num_clients,
            images_per_client=images_per_client,
            attacker_images=attacker_images,
            image_size=image_size,
            channels=channels,
            partition=partition,
            csv=csv,
            num_classes=num_classes,
            seed=seed,
            pooled_batch_size=pooled_batch_size,
        )
        self.root = Path(root)

    def catalogue(self) -> Catalogue:
        return folder_catalogue(self.root, self.image_shape)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"root": str(self.root.resolve())}


def folder_catalogue(root: Path, image_shape: ImageShape) -> Catalogue:
    """Index the images at `root/<class>/<name>`; one warning counts what else there is.

    Raises:
        MissingFile: the folder does not exist, or contains no images in class folders.
        SettingError: a folder cannot be listed.
    """
    if not os.path.isdir(root):
        if os.path.isfile(root):
            raise MissingFile(
                f"'{root}' is a file. Set `data.root` to a folder with one folder per class; a table of images is read "
                "by `--data.csv`, CIFAR-10 in an archive by `--data CIFAR10`."
            )
        raise MissingFile(f"There is no folder '{root}'. Set `data.root` to a folder with one folder per class.")
    paths: list[Path] = []
    labels: list[int] = []
    try:
        top = [(path, is_folder and not path.name.startswith(".")) for path, is_folder in _entries(root)]
        folders = [path for path, is_class in top if is_class]
        skipped = [path for path, is_class in top if not is_class]
        for label, folder in enumerate(folders):
            for path, is_folder in _entries(folder):
                if is_image_name(path.name) and not is_folder:
                    paths.append(path)
                    labels.append(label)
                else:
                    skipped.append(path)
    except OSError as error:
        raise SettingError(
            f"The folder '{error.filename}' cannot be listed ({error.strerror}). Check its permissions."
        ) from error
    class_names = [readable_name(folder.name) for folder in folders]

    remarks = []
    if skipped:
        names = [path.relative_to(root).as_posix() for path in skipped]
        remarks.append(f"not images in class folders, thus skipped: {len(names)} ({first_of(names)})")
    if not paths:
        raise MissingFile(
            f"The folder '{root}' has no images in class folders. Arrange them as {root}/<class>/<name>, with one of "
            f"the endings {', '.join(sorted(IMAGE_SUFFIXES))}.{''.join(f' So far {remark}.' for remark in remarks)}"
        )
    if empty := [class_names[label] for label in sorted({*range(len(folders))} - {*labels})]:
        remarks.append(f"classes without images: {len(empty)} ({first_of(empty)})")
    if remarks:
        rank_zero_warn(f"'{root}': {'; '.join(remarks)}.")

    channels, image_size, _ = image_shape
    return Catalogue(
        labels=torch.tensor(labels),
        class_names=class_names,
        read=lambda index: read_image(paths[index], image_size, channels),
        source=lambda index: readable_name(paths[index]),
    )


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """What a folder holds, sorted by name, and whether each entry is a folder itself."""
    with os.scandir(folder) as entries:
        return sorted((Path(entry.path), entry.is_dir()) for entry in entries)
