"""Is a reconstruction nearer to its own original than to strangers? It reads the ground truth; attacks must not."""

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fl_lightning.data.image_folder import folder_catalogue
from fl_lightning.data.images import to_pixels
from fl_lightning.data.photographs import PHOTOGRAPHS
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageShape

CROPS = 63
"""Crops of each of the 16 photographs: 1008 strangers."""
SMALLEST_CROP = 1 / 3
"""Side of the smallest crop, as a share of the photograph's shorter side."""
MOST_STRANGERS = 1000
"""Images that are read of a folder, spread evenly over it."""
SAME = 0.999
"""Correlation from which a stranger is the original itself, and is left out."""


class Strangers:
    """Public images that no client holds, with which a candidate is compared.

    The distance of two images is one minus the correlation of their pixels, so it does not depend on brightness and
    contrast, and noise, which lowers all correlations alike, does not decide. A reconstruction that has nothing of its
    original is nearest to it by chance: with S strangers once in S + 1 times, and as reconstructions are assigned to N
    originals, at most in N of N + S.

    Args:
        images: (S, C, H, W) uint8.
        sources: where each comes from; a stranger from where an original comes from is not compared with it.
        origin: what they are, in words.
    """

    def __init__(self, images: Tensor, sources: Sequence[str], origin: str) -> None:
        self.pixels = _normalised(images / 255)
        self.sources = list(sources)
        self.origin = origin

    @classmethod
    def photographs(cls, image_shape: ImageShape, seed: int = 0) -> "Strangers":
        """Random crops of the photographs that scikit-image and scikit-learn ship.

        Args:
            image_shape: (C, H, W) of the images to compare.
            seed: of the crops.
        """
        channels, size, _ = image_shape
        chance = torch.Generator().manual_seed(seed)
        images, sources = [], []
        for package, path in PHOTOGRAPHS.values():
            with Image.open(files(package) / path) as opened:
                picture = opened.convert("L" if channels == 1 else "RGB")
            for _ in range(CROPS):
                share, x, y = torch.rand(3, generator=chance).tolist()
                side = int(min(picture.size) * (SMALLEST_CROP + (1 - SMALLEST_CROP) * share))
                left, top = int(x * (picture.width - side)), int(y * (picture.height - side))
                crop = picture.crop((left, top, left + side, top + side))
                images.append(to_pixels(crop, size, channels))
                sources.append(f"{package}/{path}")
        return cls(torch.stack(images), sources, f"{len(images)} crops of photographs in scikit-image and scikit-learn")

    @classmethod
    def folder(cls, root: str | os.PathLike, image_shape: ImageShape) -> "Strangers":
        """At most 1000 images of a folder `root/<class>/<name>`, spread evenly.

        Raises:
            MissingFile: there are none.
            SettingError: one cannot be read.
        """
        catalogue = folder_catalogue(Path(root), image_shape)
        every = torch.arange(len(catalogue.labels))
        if len(every) > MOST_STRANGERS:
            every = every[torch.linspace(0, len(every) - 1, MOST_STRANGERS).round().long()]
        found = catalogue.read_all(every, image_shape)
        return cls(found.pixels, found.sources, f"{len(every)} images of the folder '{Path(root).name}'")

    def nearer(self, reconstructions: Tensor, originals: Tensor, sources: Sequence[str] = ()) -> Tensor:
        """How many strangers are at least as near to a reconstruction as its own original.

        Args:
            reconstructions: (N, C, H, W) in [0, 1], in the order of the originals.
            originals: (N, C, H, W) in [0, 1].
            sources: where each original comes from; empty if unknown.

        Returns:
            (N,) long; 0 where the original is the nearest of all, and so can be told from the strangers.

        Raises:
            SettingError: shapes differ.
        """
        if reconstructions.shape != originals.shape or originals.flatten(1).shape[1] != self.pixels.shape[1]:
            raise SettingError(
                f"Reconstructions of shape {tuple(reconstructions.shape)} and originals of {tuple(originals.shape)} "
                f"cannot be compared with strangers of {self.pixels.shape[1]} values. Resize them to one shape."
            )
        found, true = _normalised(reconstructions), _normalised(originals)
        own = (found * true).sum(1, keepdim=True)
        counted = true @ self.pixels.T < SAME
        if sources:
            same = [[theirs == source for theirs in self.sources] for source in sources]
            counted &= ~torch.tensor(same)
        return (((found @ self.pixels.T) >= own) & counted).sum(1)

    def __len__(self) -> int:
        return len(self.pixels)


def _normalised(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C*H*W) of mean 0 and norm 1; images of one value become 0, which correlates with nothing."""
    flat = images.float().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)
