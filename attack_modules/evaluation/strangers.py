"""Is a reconstruction nearer to its own original than to strangers? It reads the ground truth; attacks must not."""

import functools
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from attack_modules.evaluation.confirmation import Confirmation
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
FALSE_ALARMS = 0.01
"""Share of the strangers that may be taken for images of the training data."""


class Comparison(NamedTuple):
    """How near reconstructions are to their originals, measured by strangers."""

    nearer: Tensor
    """(N,) long: strangers at least as near to a reconstruction as its own original. 0 where the original is the
    nearest of all, and so can be told from the strangers."""
    chance: float
    """Share of the images whose rank would be 0 at most if reconstructions had nothing of their own originals.

    Reconstructions are assigned to originals, so each original has the best of N chances: N / (N + S) with S strangers
    of the originals' kind. Whether they are of that kind shows in the reconstructions of the *other* originals: a share
    q of them is nearer to an original than to all strangers, and N q bounds the chance. So strangers of another kind
    (photographs for radiographs), and reconstructions that are all alike, show no leak."""


class Confirmed(NamedTuple):
    """How well an attacker who has the reconstructions tells the peers' images from strangers, when shown both."""

    rate: float
    """Share of the originals that are nearer to a reconstruction than all but 1 % of the strangers are."""
    area: float
    """Chance that an original is nearer than a stranger: 0.5 tells nothing, 1 everything."""
    by_others: float
    """The same rate of originals and the reconstructions of all *other* originals: what being alike explains."""


class Strangers:
    """Public images that no client holds, with which a candidate is compared.

    The distance of two images is one minus the correlation of their pixels, so it does not depend on brightness and
    contrast, and noise, which lowers all correlations alike, does not decide.

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
        images, sources = _crops(image_shape, seed)
        return cls(images, sources, f"{len(images)} crops of photographs in scikit-image and scikit-learn")

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

    def compare(self, reconstructions: Tensor, originals: Tensor, sources: Sequence[str] = ()) -> Comparison:
        """Compare reconstructions with their own originals and with all strangers.

        Args:
            reconstructions: (N, C, H, W) in [0, 1], in the order of the originals.
            originals: (N, C, H, W) in [0, 1].
            sources: where each original comes from; empty if unknown.

        Raises:
            SettingError: shapes differ.
        """
        if reconstructions.shape != originals.shape or originals.flatten(1).shape[1] != self.pixels.shape[1]:
            raise SettingError(
                f"Reconstructions of shape {tuple(reconstructions.shape)} and originals of {tuple(originals.shape)} "
                f"cannot be compared with strangers of {self.pixels.shape[1]} values. Resize them to one shape."
            )
        found, true = _normalised(reconstructions), _normalised(originals)
        to_originals, to_strangers = found @ true.T, found @ self.pixels.T  # by reconstruction
        counted = true @ self.pixels.T < SAME  # by original
        if sources:
            counted &= ~torch.tensor([[theirs == source for theirs in self.sources] for source in sources])
        count = len(found)
        nearer = torch.zeros(count, dtype=torch.long)
        by_others = 0  # reconstructions of other images that are nearer to an original than to all strangers
        for index in range(count):
            own = to_originals[:, index, None]
            ranks = ((to_strangers >= own) & counted[index]).sum(1)
            nearer[index] = ranks[index]
            by_others += int((ranks == 0).sum()) - int(ranks[index] == 0)
        expected = by_others / (count - 1) if count > 1 else 0.0  # N times the share of N (N - 1) pairs
        return Comparison(nearer, min(1.0, max(expected, count / (count + len(self)))))

    def confirm(self, reconstructions: Tensor, originals: Tensor, sources: Sequence[str] = ()) -> Confirmed | None:
        """Confirm originals and strangers by their distances from the nearest reconstruction.

        Strangers that equal an original, or come from where one does, are left out.

        Args:
            reconstructions: (M, C, H, W) in [0, 1], in the order of the originals; NaN where there is none.
            originals: (M, C, H, W) in [0, 1].
            sources: where each original comes from; empty if unknown.

        Returns:
            The rates; None where there is no reconstruction, or no stranger is left.
        """
        has_one = reconstructions.flatten(1).isfinite().all(1)
        found, true = _normalised(reconstructions[has_one]), _normalised(originals)
        foreign = ((true @ self.pixels.T).amax(0) < SAME) if len(true) else torch.zeros(len(self), dtype=torch.bool)
        origins = set(sources)
        foreign &= torch.tensor([source not in origins for source in self.sources])
        if not len(found) or not foreign.any():
            return None
        strangers = 1 - (found @ self.pixels[foreign].T).amax(0)
        near = 1 - found @ true.T  # by reconstruction and original
        others = near.clone()
        own = has_one.nonzero().flatten()
        others[torch.arange(len(own)), own] = torch.inf
        member = torch.cat([torch.ones(len(true), dtype=torch.bool), torch.zeros(len(strangers), dtype=torch.bool)])
        shown, alike = (Confirmation(torch.cat([to.amin(0), strangers]), member) for to in (near, others))
        return Confirmed(shown.true_positive_rate(FALSE_ALARMS), shown.area(), alike.true_positive_rate(FALSE_ALARMS))

    def __len__(self) -> int:
        return len(self.pixels)


def _normalised(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C*H*W) of mean 0 and norm 1; images of one value become 0, which correlates with nothing."""
    flat = images.float().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)


@functools.lru_cache(maxsize=2)
def _crops(image_shape: ImageShape, seed: int) -> tuple[Tensor, list[str]]:
    """Crops of the embedded photographs, (S, C, H, W) uint8, and where each comes from."""
    channels, size, _ = image_shape
    chance = torch.Generator().manual_seed(seed)
    images, sources = [], []
    for package, path in PHOTOGRAPHS.values():
        with Image.open(files(package) / path) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
        scale = size / (SMALLEST_CROP * min(picture.size))  # at which the smallest crop has the images' size
        if scale < 1:
            picture = picture.resize((round(scale * picture.width), round(scale * picture.height)))
        for _ in range(CROPS):
            share, x, y = torch.rand(3, generator=chance).tolist()
            side = int(min(picture.size) * (SMALLEST_CROP + (1 - SMALLEST_CROP) * share))
            left, top = int(x * (picture.width - side)), int(y * (picture.height - side))
            images.append(to_pixels(picture.crop((left, top, left + side, top + side)), size, channels))
            sources.append(f"{package}/{path}")
    return torch.stack(images), sources
