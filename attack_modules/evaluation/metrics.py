"""How much of each original a reconstruction shows. For evaluation only: it reads the truth."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from sklearn.metrics import adjusted_rand_score
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
"""PSNR in dB: at each, the summary gives the share of originals that reach it."""
QUALITY = ("psnr", "ssim", "ms_ssim", "vif", "lpips")
RECOGNITION = ("recognised_top1", "recognised_top5", "original_top1", "original_top5")
BATCH = 16
"""Images measured at a time: windowed SSIM holds ten copies of them."""
Measure = Callable[[Tensor, Tensor], Tensor]
"""(n, C, H, W) reconstructions and their originals, both in [0, 1] -> (n,)."""


@dataclass(frozen=True)
class Scorecard:
    """The scores of one set of reconstructions, all on the CPU."""

    assignment: Tensor
    """(M,) long: for each original the index of its reconstruction, -1 if it has none."""
    per_image: dict[str, Tensor]
    """(M,) float columns. `QUALITY` is NaN for an original without reconstruction: psnr in dB (infinite for identical
    images), ssim, ms_ssim and vif (1 = identical), lpips (0 = identical). The rest is 0 or 1, and 0 for it:
    label_correct, recognised_top1 and _top5 (by a classifier, of the reconstruction), original_top1 and _top5 (of the
    original, the most that can be reached). What could not be measured has no column."""
    reconstructions: int
    """N, matched or not."""
    labels_found: float | None
    """Share of the originals' labels, each counted as often as it occurs, that are among the inferred ones, whichever
    image they belong to."""

    def summary(self) -> dict[str, float]:
        """Numbers for a table.

        `<quality>_mean` and `_median`, and `psnr_min`, are over the originals that have a reconstruction (NaN if none
        has). Shares are over all originals: `share_18db` and so on, `label_accuracy`, `labels_found`, `RECOGNITION`.
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
    """Match reconstructions to originals, then measure each pair.

    Args:
        reconstructions: (N, C, H, W); clamped to [0, 1]. N may be less or more than M.
        originals: (M, C, H, W) in [0, 1], M > 0.
        inferred_labels: (N,) long, the attack's label for each reconstruction; None if it infers none.
        labels: (M,) long.
        recogniser: of the classes that the labels are of.
        lpips: see `Lpips.if_available`.
        assignment: (M,) the reconstruction of each original, if that is settled, for instance before an enhancement.

    Raises:
        SettingError: there is no original, or shapes or lengths disagree.
    """
    if not len(originals):
        raise SettingError("There is no original to compare with. Give at least one.")
    if len(labels) != len(originals):
        raise SettingError(f"{len(labels)} labels came with {len(originals)} originals. Give one label an original.")
    if inferred_labels is not None and len(inferred_labels) != len(reconstructions):
        raise SettingError(
            f"{len(inferred_labels)} inferred labels came with {len(reconstructions)} reconstructions. "
            "Give one a reconstruction, or None."
        )
    # Under bf16-mixed, Lightning calls us inside an autocast, where SSIM's small differences of large numbers vanish.
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
    """How well the peers that were found are the true clients.

    Args:
        peers: (N,) long, the peer of each reconstruction, numbered anyhow.
        clients: (M,) long, the client of each original.
        assignment: (M,) the reconstruction of each original, -1 if it has none; those originals do not count.

    Returns:
        `peers` and `clients`, their numbers, and `adjusted_rand` (Hubert and Arabie 1985): 1 if images that belong
        together were put together and no others, 0 as by chance.
    """
    found = assignment >= 0
    index = adjusted_rand_score(clients[found].tolist(), peers.cpu()[assignment[found]].tolist())
    return {"peers": len(peers.unique()), "clients": len(clients.unique()), "adjusted_rand": float(index)}


def _measures(side: int, lpips: Lpips | None) -> dict[str, Measure]:
    """What can be measured on images whose shorter side has so many pixels, in the order of `QUALITY`."""
    measures: dict[str, Measure] = {
        "psnr": partial(peak_signal_noise_ratio, data_range=1.0, reduction="none", dim=(1, 2, 3))
    }
    if side >= 6:  # the 11-pixel window is reflected at the border
        measures["ssim"] = partial(structural_similarity_index_measure, data_range=1.0, reduction="none")
    if side >= 176:  # torchmetrics wants the window to fit 16 times (its message says 161)
        measures["ms_ssim"] = partial(multiscale_structural_similarity_index_measure, data_range=1.0, reduction="none")
    if side >= 41:
        measures["vif"] = _vif
    if lpips and side >= 31:  # or else AlexNet's pooling leaves nothing
        measures["lpips"] = lpips
    return measures


def _vif(images: Tensor, originals: Tensor) -> Tensor:
    """Pixel-domain VIF (Sheikh and Bovik 2006), whose noise variance of 2 is meant for pixels in [0, 255]."""
    return visual_information_fidelity(images * 255, originals * 255, reduction="none")


def _batches(images: Tensor, others: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images[i : i + BATCH], others[i : i + BATCH]) for i in range(0, len(images), BATCH)]


def _known(column: Tensor) -> list[float]:
    return column[~column.isnan()].tolist() or [math.nan]
