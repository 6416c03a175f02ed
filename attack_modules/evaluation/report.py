"""The files of a run directory: tables, pictures and a panel, with and without ground truth."""

import csv
import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from attack_modules.attack import Reconstruction, Verdict
from attack_modules.evaluation.metrics import RECOGNITION, Scorecard
from attack_modules.panels import draw_panel
from fl_lightning.truth import Truth

OF_ORIGINALS = RECOGNITION[2:]
"""Columns that describe the originals, and so are the same for every enhancement."""

PRINTED = ("psnr_mean", "psnr_min", "ssim_mean", "labels_found", "recognised_top1", "recognised_top5")
"""Scores in the printed summary."""

LONGEST_NAME = 16
"""Characters of a class name in a caption."""


@dataclass(frozen=True)
class Outcome:
    """Images that a run ends with, and what is known of them; on the CPU.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        labels: (N,) long.
        scorecard: scores against the originals; None without ground truth.
        misfit: (N,) or (), see `Attack.misfit`; None if it was not computed.
        verdict: the attack's own; None of intermediate and enhanced images.
    """

    images: Tensor
    labels: Tensor
    scorecard: Scorecard | None
    misfit: Tensor | None = None
    verdict: Verdict | None = None

    def numbers(self) -> dict[str, float]:
        """The printed scores, as far as they are known."""
        scores = self.scorecard.summary() if self.scorecard else {}
        numbers = {name: scores[name] for name in PRINTED if name in scores}
        return numbers | ({} if self.misfit is None else {"misfit": self.misfit.mean().item()})

    def line(self) -> str:
        """The printed scores in one line."""
        return ", ".join(f"{name} {value:.3f}" for name, value in self.numbers().items())

    def results(self) -> dict[str, Any]:
        """What goes into `results.json`."""
        scores = self.scorecard.summary() if self.scorecard else {}
        return {"scores": scores, "misfit": self.misfit.mean().item()}

    def misfit_of(self, index: int) -> float:
        """Misfit of one image; NaN if there is none, the common one if it is not told image by image."""
        return float(self.misfit.expand(len(self.images))[index]) if index >= 0 else float("nan")

    def verdict_of(self, index: int) -> list[Any]:
        """Level of one image and its expected PSNR; empty if there is none, or no verdict."""
        if index < 0 or self.verdict is None:
            return ["", ""]
        expected = self.verdict.expected_psnr
        return [self.verdict.levels[index].value, f"{expected[index]:.3g}" if expected else ""]


def panel(truth: Truth | None, outcomes: dict[str, Outcome], peers: Tensor | None = None) -> Image.Image:
    """Images in rows: the originals first if they are known, then each outcome, with captions.

    Args:
        truth: the originals; each outcome's image stands below the original that it is matched to.
        outcomes: by name, in the order of the rows.
        peers: (N,) the peer that each reconstruction is attributed to, shown where there is no truth.
    """
    raw = next(iter(outcomes.values()))
    if truth is None:
        captions = [f"class {label}" for label in raw.labels.tolist()]
        if peers is not None:
            captions = [f"{caption}\npeer {peer}" for caption, peer in zip(captions, peers.tolist(), strict=True)]
        if raw.verdict:
            captions = [
                f"{caption}\n{level.value}" for caption, level in zip(captions, raw.verdict.levels, strict=True)
            ]
        if raw.misfit is not None and raw.misfit.ndim:
            captions = [f"{caption}\nmisfit {m:.2g}" for caption, m in zip(captions, raw.misfit.tolist(), strict=True)]
        return draw_panel({name: outcome.images for name, outcome in outcomes.items()}, captions)
    rows, scores = {"original": truth.images}, []
    for name, outcome in outcomes.items():
        found = outcome.scorecard.assignment >= 0
        rows[name] = outcome.images[outcome.scorecard.assignment.clamp_min(0)]
        rows[name][~found] = torch.nan
        psnr = outcome.scorecard.per_image["psnr"]
        scores.append([f"{p:.1f}" if f else "" for p, f in zip(psnr.tolist(), found.tolist(), strict=True)])
    captions = []
    for image, values in enumerate(zip(*scores, strict=True)):
        name = truth.class_names[int(truth.labels[image])]
        shown = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        score = f"{' / '.join(values)} dB" if any(values) else "not found"
        captions.append(f"{shown}\nclient {int(truth.clients[image])}\n{score}")
    return draw_panel(rows, captions)


def table(truth: Truth | None, outcomes: dict[str, Outcome], reconstruction: Reconstruction) -> str:
    """`per_image.csv`: one row an original in the peers' order, or one a reconstruction where there is no truth.

    `peer` is the peer that the attack attributes an image to, in a numbering of its own.
    """
    raw = next(iter(outcomes.values()))
    peers = reconstruction.peers

    def found(index: int) -> list[Any]:
        if index < 0:
            return ["", "", "", *raw.verdict_of(index)]
        return [index, int(raw.labels[index]), "" if peers is None else int(peers[index]), *raw.verdict_of(index)]

    columns: dict[str, list[float]] = {}
    assignment = torch.arange(len(raw.images)) if truth is None else raw.scorecard.assignment
    for name, outcome in outcomes.items():
        prefix = "" if outcome is raw else f"{name}_"
        for score, column in (outcome.scorecard.per_image if outcome.scorecard else {}).items():
            if outcome is raw or score not in OF_ORIGINALS:
                columns[prefix + score] = column.tolist()
        columns[f"{prefix}misfit"] = [outcome.misfit_of(index) for index in assignment.tolist()]
    text = io.StringIO()
    writer = csv.writer(text)
    known = [] if truth is None else ["original", "source", "person", "client", "label", "class"]
    writer.writerow([*known, "reconstruction", "inferred_label", "peer", "verdict", "expected_psnr", *columns])
    for row, index in enumerate(assignment.tolist()):
        facts: list[Any] = []
        if truth is not None:
            label = int(truth.labels[row])
            source, person = (names[row] if names else "" for names in (truth.sources, truth.persons))
            facts = [row, source, person, int(truth.clients[row]), label, truth.class_names[label]]
        writer.writerow([*facts, *found(index), *(f"{column[row]:.6g}" for column in columns.values())])
    return text.getvalue()


def comparison(results: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """`comparison.csv`: one row an enhancement, the raw reconstruction first."""
    rows = {name: results if name == "reconstruction" else results[name] for name in outcomes}
    columns = list(results["scores"])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["images", "seconds", "misfit", *columns])
    for name, row in rows.items():
        scores = [row["scores"].get(column, "") for column in columns]
        writer.writerow([name, row["seconds"], *(f"{v:.6g}" if v != "" else "" for v in [row["misfit"], *scores])])
    return text.getvalue()
