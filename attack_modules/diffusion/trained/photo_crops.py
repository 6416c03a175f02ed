"""Random crops of photographs, the training data of diffusion priors."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import pil_to_tensor

from fl_lightning.data.images import PathLike, UnreadableImage, is_image_name, read_image
from fl_lightning.errors import MissingFile, SettingError, in_short, positive
from fl_lightning.seeds import seed_of

LONGEST_SHORT_SIDE = 512
"""Short side, in pixels, to which larger photographs are downscaled when they are read, to bound memory."""


class PhotoCrops(LightningDataModule):
    """Square crops of random position, scale and horizontal flip of all photographs in some folders, held in memory.

    Each crop is downscaled by a factor of 1 to `reduction` with antialiasing, because the prior is applied to images
    that are themselves downscaled photographs.

    A file that is a copy of an image which the lists exclude from training, under any name, is left out with a warning.

    Args:
        roots: folders of photographs, searched recursively.
        validation: text file with one name per line; an image is held out for validation if its file name or the name
            of its folder is listed.
        left_out: further such files; images that they list are not used for training, nor for validation unless
            `validation` lists them too.
        crop_size: height and width of a crop, in pixels.
        reduction: largest downscaling factor, >= 1.
        image_size: height and width of the validation images, cropped and resized as in attacks (`read_image`).
        batch_size: crops per training batch, and images per validation batch.
        steps_per_epoch: batches per epoch; after each epoch, weights are exported and a checkpoint is written.
        seed: seed of the crops; null for that of `seed_everything`.

    Raises:
        SettingError: an argument is below 1.
    """

    def __init__(
        self,
        roots: list[Path],
        validation: Path,
        left_out: list[Path] = [],  # noqa: B006 - never mutated
        crop_size: int = 48,
        reduction: float = 2.0,
        image_size: int = 128,
        batch_size: int = 16,
        steps_per_epoch: int = 100,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if min(crop_size, image_size, batch_size, steps_per_epoch) < 1 or not (positive(reduction) and reduction >= 1):
            raise SettingError(
                "`data` needs crop_size, image_size, batch_size, steps_per_epoch and reduction of at least 1, but got "
                f"{crop_size}, {image_size}, {batch_size}, {steps_per_epoch} and {reduction}."
            )
        self.roots = [Path(root) for root in roots]
        self.validation = Path(validation)
        self.left_out = [Path(path) for path in left_out]
        self.crop_size = crop_size
        self.reduction = reduction
        self.image_size = image_size
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed or 0

    def setup(self, stage: str) -> None:
        if hasattr(self, "crops"):
            return
        validation, left_out = read_names(self.validation), {n for path in self.left_out for n in read_names(path)}
        paths = [path for root in self.roots for path in image_paths(root)]
        held_out = [path for path in paths if {path.name, path.parent.name} & validation]
        excluded = {path for path in paths if {path.name, path.parent.name} & (validation | left_out)}
        training = without_copies([path for path in paths if path not in excluded], excluded)
        if not training or not held_out:
            raise SettingError(
                f"Of {len(paths)} images, {len(training)} remain for training and {len(held_out)} are held out by "
                f"'{self.validation}', but each set needs at least one. "
                "Add folders to `data.roots` or change the names in that file."
            )
        self.crops = Crops([read_photograph(path) for path in training], self.crop_size, self.reduction, self.seed)
        self.held_out = Shown(held_out, self.image_size)
        # Up to six training images, preprocessed like the validation images, on which a baseline is tuned.
        self.tuning_images = torch.stack(list(Shown(training[:: max(1, len(training) // 6)][:6], self.image_size)))

    def train_dataloader(self) -> DataLoader:
        ahead = Ahead(self.steps_per_epoch * self.batch_size)
        return DataLoader(self.crops, self.batch_size, sampler=ahead, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        # Without its own generator, every pass of a DataLoader draws from the global one.
        return DataLoader(self.held_out, self.batch_size, generator=torch.Generator())

    test_dataloader = val_dataloader


class Crops(Dataset):
    """Unlimited random crops; the same index always gives the same crop.

    Args:
        photographs: RGB images.
        size: height and width of a crop, in pixels.
        reduction: largest downscaling factor; it is limited by the size of the photograph.
        seed: seed of all crops.

    Raises:
        SettingError: a photograph is smaller than a crop.
    """

    def __init__(self, photographs: list[Image.Image], size: int, reduction: float, seed: int) -> None:
        if (smallest := min(min(photograph.size) for photograph in photographs)) < size:
            raise SettingError(
                f"The smallest photograph is {smallest} pixels high or wide, but crops need {size} pixels. "
                "Lower `data.crop_size` or remove small images."
            )
        self.photographs = photographs
        self.size = size
        self.reduction = reduction
        self.seed = seed

    def __getitem__(self, index: int) -> Tensor:
        """Return the crop as float32 (3, size, size) in [0, 1]."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, index))
        photograph = self.photographs[int(torch.randint(len(self.photographs), (), generator=generator))]
        scale, across, down, flip = torch.rand(4, generator=generator).tolist()
        side = min(self.size * (1 + scale * (self.reduction - 1)), *photograph.size)
        left, top = across * (photograph.width - side), down * (photograph.height - side)
        box = (left, top, left + side, top + side)
        crop = photograph.resize((self.size, self.size), Image.Resampling.LANCZOS, box)
        return pil_to_tensor(ImageOps.mirror(crop) if flip < 0.5 else crop).float() / 255


class Ahead(Sampler[int]):
    """Crop indices of an epoch: each epoch continues where the previous one ended, also in a resumed run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.count, (self.epoch + 1) * self.count))

    def __len__(self) -> int:
        return self.count


class Shown(Dataset):
    """Whole images, cropped and resized as in attacks: float32 (3, size, size) in [0, 1]."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.pixels = torch.stack([read_image(path, size, 3) for path in paths])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index].float() / 255


def image_paths(root: Path, setting: str = "data.roots") -> list[Path]:
    """Return all image files in a folder and its subfolders, sorted.

    Args:
        root: the folder.
        setting: that names it, for the error.

    Raises:
        MissingFile: the folder does not exist or contains no image.
    """
    paths = sorted(path for path in root.rglob("*") if is_image_name(path.name)) if root.is_dir() else []
    if not paths:
        raise MissingFile(f"There is no folder '{root}' with images in it. Set `{setting}` to folders of photographs.")
    return paths


def without_copies(paths: list[Path], excluded: set[Path]) -> list[Path]:
    """Return the paths whose files are not equal to one of the excluded files, and warn of those that are.

    Raises:
        UnreadableImage: a file cannot be read.
    """
    known = {content(path) for path in excluded}
    copies = {path for path in paths if content(path) in known}
    if copies:
        rank_zero_warn(
            f"{len(copies)} of {len(paths)} training images are copies of images held out for validation or left out, "
            f"for example '{min(copies)}'. They are not trained on."
        )
    return [path for path in paths if path not in copies]


def content(path: Path) -> bytes:
    """Return the SHA-256 of a file.

    Raises:
        UnreadableImage: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise UnreadableImage(
            f"The photograph '{path}' cannot be read ({error.strerror}). Replace it or remove it from the folder."
        ) from error


def read_names(path: Path) -> set[str]:
    """Return the names in a text file with one name per line; lines that begin with # are comments.

    Raises:
        MissingFile: the file does not exist.
    """
    if not path.is_file():
        raise MissingFile(f"There is no list of names at '{path}'. Write one folder or file name per line.")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def read_photograph(path: PathLike) -> Image.Image:
    """Read a whole photograph in RGB, rotated upright; downscaled if its short side exceeds `LONGEST_SHORT_SIDE`.

    Raises:
        UnreadableImage: the file is truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            photograph = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly any exception on invalid data
        raise UnreadableImage(
            f"The photograph '{path}' cannot be read ({in_short(error)}). Replace it or remove it from the folder."
        ) from error
    factor = LONGEST_SHORT_SIDE / min(photograph.size)
    if factor < 1:
        size = (round(photograph.width * factor), round(photograph.height * factor))
        photograph = photograph.resize(size, Image.Resampling.LANCZOS)
    return photograph
