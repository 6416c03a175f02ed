"""Quality of reconstructions compared with the originals. It reads the ground truth, so attacks must not call it."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
    visual_information_fidelity,
)

from attack_modules.evaluation.assignment import match
from attack_modules.evaluation.perceptual import Lpips
from attack_modules.evaluation.recognisers import Recognises
from fl_lightning.errors import SettingError

THRESHOLDS = (18, 20, 22)
"""PSNR thresholds in dB; for each, the summary reports the fraction of originals that reach it."""
QUALITY = ("psnr", "ssim", "ms_ssim", "vif", "lpips")
RECOGNITION = ("recognised_top1", "recognised_top5", "original_top1", "original_top5")
BATCH = 16
"""Image pairs measured at a time; SSIM needs memory for about ten copies of them."""
Measure = Callable[[Tensor, Tensor], Tensor]
"""Metric that maps (n, C, H, W) reconstructions and their originals, both in [0, 1], to (n,) values."""


@dataclass(frozen=True)
class Scorecard:
    """Scores of one set of reconstructions; all tensors are on the CPU."""

    assignment: Tensor
    """(M,) long: for each original the index of its reconstruction, -1 if it has none."""
    per_image: dict[str, Tensor]
    """(M,) float columns, one value per original. Metrics that could not be computed have no column.

    `QUALITY`, NaN for originals without a reconstruction: psnr in dB (infinite for identical images); ssim, ms_ssim
    and vif (1 = identical); lpips (0 = identical). All other columns are 0 or 1: label_correct, and recognised_top1
    and _top5 (whether a classifier predicts the label of the reconstruction), are 0 for originals without a
    reconstruction; original_top1 and _top5 (the same for the original) are the reference for these.
    """
    reconstructions: int
    """Number N of reconstructions, assigned or not."""
    labels_found: float | None
    """Fraction of the originals' labels, counted with multiplicity, that occur among the inferred labels, irrespective
    of the image; None without inferred labels."""

    def summary(self) -> dict[str, float]:
        """Aggregate the scores to scalars.

        `<quality>_mean`, `<quality>_median` and `psnr_min` are taken over the originals with a reconstruction (NaN if
        there are none). `share_18db`, `share_20db`, `share_22db`, `label_accuracy`, `labels_found` and those of
        `RECOGNITION` are fractions of all originals.
        """
        psnr = self.per_image["psnr"]
        summary: dict[str, float] = {"originals": len(psnr), "reconstructions": self.reconstructions}
        for name in QUALITY:
            if name in self.per_image:
                values = _known(self.per_image[name])
                summary[f"{name}_mean"] = statistics.fmean(values)
                summary[f"{name}_median"] = statistics.median(values)
        summary["psnr_min"] = min(_known(psnr))
        for threshold in THRESHOLDS:
            summary[f"share_{threshold}db"] = (psnr >= threshold).double().mean().item()
        if self.labels_found is not None:
            summary["label_accuracy"] = self.per_image["label_correct"].double().mean().item()
            summary["labels_found"] = self.labels_found
        for name in RECOGNITION:
            if name in self.per_image:
                summary[name] = self.per_image[name].double().mean().item()
        return summary


@torch.no_grad()
def score(
    reconstructions: Tensor,
    originals: Tensor,
    inferred_labels: Tensor | None,
    labels: Tensor,
    recogniser: Recognises | None = None,
    lpips: Lpips | None = None,
    assignment: Tensor | None = None,
) -> Scorecard:
    """Assign reconstructions to originals and compute the metrics of each pair.

    Args:
        reconstructions: (N, C, H, W), clamped to [0, 1]; N may be smaller or larger than M.
        originals: (M, C, H, W), clamped to [0, 1]; M > 0.
        inferred_labels: (N,) long, the attack's label of each reconstruction; None if it infers none.
        labels: (M,) long, the true label of each original.
        recogniser: classifier of the classes of `labels`; None: recognition is not measured.
        lpips: see `Lpips.if_available`; None: LPIPS is not computed.
        assignment: (M,) long, index of each original's reconstruction (-1: none), if already known, for example from
            before an enhancement; None: computed by `match`.

    Raises:
        SettingError: there are no originals, or shapes or lengths do not agree.
    """
    if not len(originals):
        raise SettingError("There is no original to compare with. Provide at least one.")
    if len(labels) != len(originals):
        raise SettingError(f"{len(labels)} labels came with {len(originals)} originals. Give one label per original.")
    if inferred_labels is not None and len(inferred_labels) != len(reconstructions):
        raise SettingError(
            f"{len(inferred_labels)} inferred labels came with {len(reconstructions)} reconstructions. "
            "Give one label per reconstruction, or None."
        )
    # With bf16-mixed, Lightning calls this under autocast, but SSIM subtracts large, nearly equal numbers.
    with torch.autocast(originals.device.type, enabled=False):
        originals, labels = originals.float().clamp(0, 1), labels.cpu()
        assignment = match(reconstructions, originals) if assignment is None else assignment
        found = assignment >= 0
        matched = reconstructions[assignment[found]].to(originals).clamp(0, 1)

        per_image = {}
        for name, measure in _measures(min(originals.shape[-2:]), lpips).items():
            values = [measure(*pair).cpu() for pair in _batches(matched, originals[found])]
            per_image[name] = torch.full((len(originals),), math.nan)
            per_image[name][found] = torch.cat([torch.zeros(0), *values])
        labels_found = None
        if inferred_labels is not None:
            inferred_labels = inferred_labels.cpu()
            per_image["label_correct"] = torch.zeros(len(originals))
            per_image["label_correct"][found] = (inferred_labels[assignment[found]] == labels[found]).float()
            common = Counter(labels.tolist()) & Counter(inferred_labels.tolist())
            labels_found = sum(common.values()) / len(labels)
        if recogniser:
            for name, hits in zip(RECOGNITION[:2], recogniser(matched, labels[found]), strict=True):
                per_image[name] = torch.zeros(len(originals))
                per_image[name][found] = hits.float()
            for name, hits in zip(RECOGNITION[2:], recogniser(originals, labels), strict=True):
                per_image[name] = hits.float()
    return Scorecard(assignment, per_image, len(reconstructions), labels_found)


def attribution(peers: Tensor, clients: Tensor, assignment: Tensor) -> dict[str, float]:
    """Measure the agreement of the inferred peers with the true clients.

    Args:
        peers: (N,) long, the inferred peer of each reconstruction, in any numbering.
        clients: (M,) long, the client of each original.
        assignment: (M,) long, index of each original's reconstruction; originals with -1 (none) are ignored in the
            Rand index.

    Returns:
        The numbers of distinct `peers` and `clients`, and the adjusted Rand index `adjusted_rand` (Hubert and Arabie
        1985): 1 for identical groupings, 0 in expectation for random ones.
    """
    from sklearn.metrics import adjusted_rand_score  # takes half a second to load

    found = assignment >= 0
    index = adjusted_rand_score(clients[found].tolist(), peers.cpu()[assignment[found]].tolist())
    return {"peers": len(peers.unique()), "clients": len(clients.unique()), "adjusted_rand": float(index)}


def _measures(side: int, lpips: Lpips | None) -> dict[str, Measure]:
    """Select the metrics that are defined for images whose shorter side is `side`, in the order of `QUALITY`."""
    measures: dict[str, Measure] = {
        "psnr": partial(peak_signal_noise_ratio, data_range=1.0, reduction="none", dim=(1, 2, 3))
    }
    if side >= 6:  # reflection padding by 5 pixels, for the 11-pixel window, needs a larger side
        measures["ssim"] = partial(structural_similarity_index_measure, data_range=1.0, reduction="none")
    if side >= 176:  # torchmetrics requires 16 times the window (its error message says 161)
        measures["ms_ssim"] = partial(multiscale_structural_similarity_index_measure, data_range=1.0, reduction="none")
    if side >= 41:
        measures["vif"] = _vif
    if lpips and side >= 31:  # smaller images vanish in AlexNet's pooling
        measures["lpips"] = lpips
    return measures


def _vif(images: Tensor, originals: Tensor) -> Tensor:
    """Compute pixel-domain VIF (Sheikh and Bovik 2006), whose noise variance of 2 assumes pixels in [0, 255]."""
    return visual_information_fidelity(images * 255, originals * 255, reduction="none")


def _batches(images: Tensor, others: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images[i : i + BATCH], others[i : i + BATCH]) for i in range(0, len(images), BATCH)]


def _known(column: Tensor) -> list[float]:
    return column[~column.isnan()].tolist() or [math.nan]
