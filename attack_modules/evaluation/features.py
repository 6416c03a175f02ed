"""Leaked features compared with those of the originals: how many are right, and whose a candidate image are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fl_lightning.models import ImageClassifier

CHUNK = 16
"""Images that are passed through the model at once."""
RIGHT = 0.01
"""Relative error up to which features count as found."""


@torch.no_grad()
def features_of(images: Tensor, model: ImageClassifier) -> Tensor:
    """(N, D) features of images (N, C, H, W) in [0, 1] under a model in eval mode, on the CPU."""
    model.eval()
    return torch.cat([model.embed(chunk.to(model.mean)).cpu() for chunk in images.split(CHUNK)])


def distances(leaked: Tensor, features: Tensor) -> Tensor:
    """(M, N) distance of each of the features (M, D) to each leaked one (N, D), relative to the norm of the former."""
    apart = torch.cdist(features.double(), leaked.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return apart / features.double().norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def feature_scores(leaked: Tensor, features: Tensor) -> dict[str, Any]:
    """What goes into `results.json`: of the M originals, how many have a leaked feature vector within 1 %.

    Args:
        leaked: (N, D).
        features: (M, D) of the originals.
    """
    errors = distances(leaked, features).min(1).values
    return {
        "originals": len(features),
        "share_within_1_percent": (errors <= RIGHT).double().mean().item(),
        "error_median": errors.median().item(),
        "error_max": errors.max().item(),
    }


@dataclass(frozen=True)
class Confirmation:
    """Whether candidate images were among those that peers trained on, by the distance of their features.

    Attributes:
        distances: (K,) of each candidate to the nearest leaked feature vector, relative.
        nearest: (K,) long, which that is.
    """

    distances: Tensor
    nearest: Tensor

    @classmethod
    def of(cls, leaked: Tensor, candidates: Tensor) -> "Confirmation":
        """Of the features of candidates (K, D), given those that leaked (N, D)."""
        return cls(*distances(leaked, candidates).min(1))

    def true_positive_rate(self, member: Tensor, false_positive_rate: float) -> float:
        """Share of the members that are nearer than the strangers, but for the given share of these.

        Args:
            member: (K,) bool, the truth.
            false_positive_rate: of the strangers, in [0, 1); below one in their number, no stranger is admitted.
        """
        strangers = self.distances[~member].sort().values
        threshold = strangers[int(false_positive_rate * len(strangers))]
        return (self.distances[member] < threshold).double().mean().item()
