"""A run that has ended, read back from its folder, with the originals where they lie beside it."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attack_modules.evaluation.strangers import Confirmed, Strangers
from fl_lightning.data.images import read_image, read_size
from fl_lightning.errors import in_short
from fl_lightning.record import Record
from fl_lightning.storage import StorageError, has_record, read_json
from fl_lightning.truth import Truth

ACCURACIES = ("test_accuracy", "train_accuracy")
"""What a federation logs of its global model, the more telling first."""


@dataclass(frozen=True)
class ImageRow:
    """One original and what was found of it; without ground truth, one reconstruction.

    Attributes:
        source: where the original comes from; empty if unknown.
        person: whom the original shows; empty if unknown.
        client: that holds it; None without ground truth.
        class_name: of the original; of a reconstruction, the class that the attack infers.
        verdict: the attack's own; empty if the image was not found.
        psnr: in dB, NaN if it was not found or there is no original.
        ssim: likewise.
        recognised: whether a classifier that takes no part in the attack predicts the original's label from the
            reconstruction; None where there is no such classifier.
        nearer: strangers at least as near to the reconstruction as its original; None if it was not found, or there is
            no original.
    """

    source: str
    person: str
    client: int | None
    class_name: str
    verdict: str
    psnr: float
    ssim: float
    recognised: bool | None
    nearer: int | None


@dataclass(frozen=True)
class FinishedRun:
    """Results of a run.

    Attributes:
        results: of `results.json`.
        rows: one for each original; one for each reconstruction where there is no ground truth.
        originals: (M, C, H, W) in [0, 1]; None where there is no ground truth.
        images: (M, C, H, W) in [0, 1], the reconstruction of each row; NaN where there is none.
        strangers: how many were compared with; 0 where there is no ground truth.
        chance: see `Comparison`; 1 where there is no ground truth.
        confirmed: how well originals are told from strangers; None where there is no ground truth, or nothing to
            compare.
        accuracy: of the federation's global model after its last round, with what it was measured on (`test_accuracy`
            or `train_accuracy`); None where nothing is known.
    """

    results: dict[str, Any]
    rows: list[ImageRow]
    originals: Tensor | None
    images: Tensor
    strangers: int
    chance: float
    confirmed: Confirmed | None
    accuracy: tuple[str, float] | None

    @classmethod
    def load(cls, directory: Path, strangers_of: "StrangersOf", observation: Path | None = None) -> "FinishedRun":
        """Read a run's directory.

        Args:
            directory: of `fit`.
            strangers_of: the shape of an image -> what it is compared with.
            observation: the record that the run read; None for where it was then.

        Raises:
            StorageError: a file is missing or damaged.
            UnreadableImage: a picture cannot be read.
        """
        results = read_json(directory / "results.json")
        try:
            table = list(csv.DictReader((directory / "per_image.csv").read_text(encoding="utf-8").splitlines()))
            places = [int(row["reconstruction"]) if row["reconstruction"] else -1 for row in table]
            record, rounds = Record(observation or Path(results["observation"])), results["observed_rounds"]
            clients = results.get("observed_clients") or [None] * len(rounds)  # runs of before had none
            stems = [record.truth(*view) for view in zip(rounds, clients, strict=True)]
        except (OSError, KeyError, ValueError) as error:
            raise StorageError(
                f"The results in '{directory}' are incomplete ({in_short(error)}). Delete the folder, "
                "and run the cell again."
            ) from error
        truth = Truth.union([Truth.load(stem) for stem in stems]) if all(map(has_record, stems)) else None
        originals = None if truth is None else truth.images
        images = _pictures(directory / "images", places, originals)
        nearer: list[int | None] = [None] * len(table)
        count, chance, confirmed = 0, 1.0, None
        if originals is not None and len(originals):
            strangers = strangers_of(tuple(originals.shape[1:]))
            count = len(strangers)
            found = [row for row, place in enumerate(places) if place >= 0]
            sources = [row["source"] for row in table]
            known = sources if all(sources) else []
            comparison = strangers.compare(images[found], originals[found], [known[row] for row in found if known])
            chance, confirmed = comparison.chance, strangers.confirm(images, originals, known)
            for row, number in zip(found, comparison.nearer.tolist(), strict=True):
                nearer[row] = number
        rows = [_row(row, number, truth is not None) for row, number in zip(table, nearer, strict=True)]
        return cls(results, rows, originals, images, count, chance, confirmed, _accuracy(record))


class StrangersOf:
    """What images are compared with, made once for each shape.

    Args:
        folder: public images `folder/<class>/<name>`; None for crops of the embedded photographs.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.root = folder
        self._made: dict[Sequence[int], Strangers] = {}

    def __call__(self, image_shape: tuple[int, int, int]) -> Strangers:
        if image_shape not in self._made:
            made = Strangers.photographs(image_shape) if self.root is None else Strangers.folder(self.root, image_shape)
            self._made[image_shape] = made
        return self._made[image_shape]

    @property
    def origins(self) -> list[str]:
        """What was compared with so far, in words."""
        return sorted({made.origin for made in self._made.values()})


def _pictures(folder: Path, places: list[int], originals: Tensor | None) -> Tensor:
    """(M, C, H, W), the picture of each place; NaN where that is -1."""
    paths = {place: folder / f"{place:03d}.png" for place in places if place >= 0}
    if originals is not None:
        channels, side = originals.shape[1], originals.shape[-1]
    elif paths:
        side, channels = read_size(next(iter(paths.values())))
    else:
        return torch.zeros(0, 3, 1, 1)
    images = torch.full((len(places), channels, side, side), math.nan)
    for row, place in enumerate(places):
        if place >= 0:
            images[row] = read_image(paths[place], side, channels) / 255
    return images


def _row(row: dict[str, str], nearer: int | None, known: bool) -> ImageRow:
    def number(column: str) -> float:
        return float(row[column]) if row.get(column) else math.nan

    recognised = number("recognised_top1")
    return ImageRow(
        source=row.get("source", ""),
        person=row.get("person", ""),
        client=int(row["client"]) if known else None,
        class_name=row["class"] if known else f"class {row['inferred_label']}",
        verdict=row["verdict"],
        psnr=number("psnr"),
        ssim=number("ssim"),
        recognised=None if math.isnan(recognised) else recognised > 0,
        nearer=nearer,
    )


def _accuracy(record: Record) -> tuple[str, float] | None:
    """The last accuracy that a federation logged."""
    folder = record.directory / "tensorboard"
    if not folder.is_dir():
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(folder)).Reload()
    for name in ACCURACIES:
        if name in events.Tags()["scalars"]:
            return name, events.Scalars(name)[-1].value
    return None
