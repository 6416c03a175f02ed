"""Image datasets with one folder per class."""

from pathlib import Path
from typing import Any

from fl_lightning.data.catalogue import Catalogue, label_indices
from fl_lightning.data.federated import FederatedData
from fl_lightning.data.images import PathLike, is_image_name, read_image
from fl_lightning.data.partition import InOrder, Partition
from fl_lightning.errors import MissingFile
from fl_lightning.models.classifier import ImageShape


class ImageFolder(FederatedData):
    """Images at `root/<class>/<name>.jpg` (or .png, .tif, ...), with classes and files in sorted order.

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
        partition: Partition = InOrder(),  # noqa: B008 - it has no state
        csv: PathLike | None = None,
        num_classes: int | None = None,
        seed: int = 0,
        pooled_batch_size: int = 128,
    ) -> None:
        super().__init__(
            num_clients=num_clients,
            images_per_client=images_per_client,
            attacker_images=attacker_images,
            image_size=image_size,
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
    """Index the images at `root/<class>/<name>`; hidden folders are ignored.

    Raises:
        MissingFile: the folder does not exist, or contains no images in class folders.
    """
    if not root.is_dir():
        raise MissingFile(f"There is no folder '{root}'. Set `data.root` to a folder with one folder per class.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths = [path for folder in folders for path in sorted(folder.iterdir()) if is_image_name(path.name)]
    if not paths:
        raise MissingFile(
            f"The folder '{root}' has no images in class folders. Arrange them as {root}/<class>/<name>.jpg."
        )
    channels, image_size, _ = image_shape
    class_names = [folder.name for folder in folders]
    return Catalogue(
        labels=label_indices([path.parent.name for path in paths], class_names),
        class_names=class_names,
        read=lambda index: read_image(paths[index], image_size, channels),
        source=lambda index: str(paths[index]),
    )
