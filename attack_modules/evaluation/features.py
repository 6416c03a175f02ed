"""Leaked features compared with those of the originals: how many are right, and which is whose."""

from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CHUNK = 16
"""Images that are passed through the model at once."""
RIGHT = 0.01
"""Relative error up to which features count as found."""


@torch.no_grad()
def features_of(images: Tensor, embed: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """(N, D) features of images (N, C, H, W) in [0, 1], on the CPU.

    Args:
        images: in [0, 1].
        embed: (n, C, H, W) images -> (n, D) features.
        device: on which `embed` takes them.
    """
    return torch.cat([embed(chunk.to(device)).cpu() for chunk in images.split(CHUNK)])


def feature_scores(leaked: Tensor, features: Tensor, seen: Tensor | None = None) -> dict[str, Any]:
    """What goes into `results.json`: of the M originals, how many have a leaked feature vector within 1 %.

    Args:
        leaked: (N, D).
        features: (M, D) of the originals.
        seen: (N, D) bool, which of the leaked features count, as dropout kept them; None for all.
    """
    errors = feature_errors(leaked, features, seen).amin(0)
    return {
        "originals": len(features),
        "share_within_1_percent": (errors <= RIGHT).double().mean().item(),
        "error_median": errors.median().item(),
        "error_max": errors.max().item(),
    } | ({} if seen is None else {"share_seen": seen.double().mean().item()})


def match_features(leaked: Tensor, features: Tensor, seen: Tensor | None = None) -> Tensor:
    """(M,) long: for each original the leaked vector that is its, one to one; -1 for none. Arguments as above."""
    rows, columns = linear_sum_assignment(feature_errors(leaked, features, seen).square())
    assignment = torch.full((len(features),), -1)
    assignment[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return assignment


def feature_errors(leaked: Tensor, features: Tensor, seen: Tensor | None = None) -> Tensor:
    """(N, M) relative distances of leaked vectors from originals, over those that were seen, from 1e-8 on.

    Arguments as above.
    """
    leaked, features = leaked.cpu().double(), features.double()
    shown = torch.ones_like(leaked) if seen is None else seen.cpu().double()
    leaked, sizes = leaked * shown, shown @ features.square().T
    # products instead of all differences, which one after the other leave holes in memory of the size of all features
    squares = leaked.square().sum(1, keepdim=True) - 2 * leaked @ features.T + sizes
    return squares.clamp_min(0).sqrt() / sizes.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
