"""Assignment of reconstructions to originals. It reads the ground truth, so attacks must not call it."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fl_lightning.errors import SettingError

PIXELS_AT_ONCE = 1 << 14
"""Values per image compared at a time, which limits the float64 copies to 64 MiB each for 512 images."""


@torch.no_grad()
def match(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Assign reconstructions to originals one to one, minimising the total squared error after clamping to [0, 1].

    Reconstructions have no particular order, so they must be assigned before they can be scored. If N and M differ,
    the surplus images stay unassigned; reconstructions with NaN or infinite pixels are never assigned.

    Args:
        reconstructions: (N, C, H, W) images.
        originals: (M, C, H, W) images.

    Returns:
        (M,) long, on the CPU: for each original the index of its reconstruction, -1 if it has none.

    Raises:
        SettingError: the images differ in shape or are not 4-dimensional.
    """
    if originals.ndim != 4 or reconstructions.shape[1:] != originals.shape[1:]:
        raise SettingError(
            f"Reconstructions of shape {tuple(reconstructions.shape)} cannot be matched to originals of shape "
            f"{tuple(originals.shape)}: both must be (images, C, H, W) with the same C, H and W. Resize one of them."
        )
    candidates = reconstructions.flatten(1).isfinite().all(1).nonzero().flatten().cpu()
    pairs = zip(
        originals.flatten(1).split(PIXELS_AT_ONCE, dim=1),
        reconstructions.flatten(1).split(PIXELS_AT_ONCE, dim=1),
        strict=True,
    )
    error = torch.zeros(len(originals), len(candidates), dtype=torch.float64)
    for truth, guess in pairs:
        guess = guess.cpu()[candidates]
        error += torch.cdist(truth.cpu().double().clamp(0, 1), guess.double().clamp(0, 1)).square()

    rows, columns = linear_sum_assignment(error.numpy())
    assignment = torch.full((len(originals),), -1)
    assignment[torch.from_numpy(rows)] = candidates[torch.from_numpy(columns)]
    return assignment
