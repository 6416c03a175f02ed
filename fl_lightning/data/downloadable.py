"""Base class of the datasets that torchvision can download."""

import os
from pathlib import Path
from typing import Any

from torchvision.datasets import VisionDataset

from fl_lightning.data.federated import FederatedData
from fl_lightning.data.images import PathLike
from fl_lightning.data.partition import InOrder, Partition
from fl_lightning.errors import MissingFile, SettingError


class DownloadableData(FederatedData):
    """A dataset of 32x32 images that is read from disk, or downloaded by torchvision.

    Args:
        root: folder that contains the dataset, or to which it is downloaded.
        download: whether to download the dataset if it is missing.
    """

    def __init__(
        self,
        root: PathLike,
        download: bool = False,
        num_clients: int = 5,
        images_per_client: int | list[int] | None = None,
        attacker_images: int | None = None,
        image_size: int = 32,
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
        self.download = download

    def from_torchvision(self, dataset: type[VisionDataset], train: bool) -> VisionDataset:
        """Load the training or the test split from torchvision's own layout under `root`.

        Raises:
            MissingFile: the split is missing or damaged, and `download` is off or the download failed.
            SettingError: `root` is a file.
        """
        if os.path.isfile(self.root):
            raise SettingError(f"'{self.root}' is a file. Set `data.root` to the folder of {dataset.__name__}.")
        try:
            return dataset(self.root, train=train, download=self.download)
        except Exception as error:  # for damaged files torchvision raises many exception types
            remedy = "Check the connection" if self.download else "Set `data.download: true` to download it"
            raise MissingFile(
                f"{dataset.__name__} is not in '{self.root}', or damaged ({str(error) or type(error).__name__}). "
                f"{remedy}, after deleting damaged files, or set `data.root` to its folder."
            ) from error

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"root": str(self.root.resolve())}
