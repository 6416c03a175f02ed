"""Leaked features compared with those of the originals: how many are right."""

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


def feature_scores(leaked: Tensor, features: Tensor) -> dict[str, Any]:
    """What goes into `results.json`: of the M originals, how many have a leaked feature vector within 1 %.

    Args:
        leaked: (N, D).
        features: (M, D) of the originals.
    """
    apart = torch.cdist(features.double(), leaked.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    errors = apart / features.double().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "originals": len(features),
        "share_within_1_percent": (errors <= RIGHT).double().mean().item(),
        "error_median": errors.median().item(),
        "error_max": errors.max().item(),
    }
