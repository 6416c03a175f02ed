"""How far the leaked features are off, from the disagreement of the hidden units that show them."""

import torch
from torch import Tensor

LEAST_SIZE = 1e-3
"""Share of the largest features below which features are none: no unit shows the image."""


def feature_uncertainty(rows: Tensor, errors: Tensor, features: Tensor, rest: Tensor | None = None) -> Tensor:
    """(N,) expected relative error of each image's features.

    Every hidden unit is an equation `row_h = sum_n errors_nh features_n`. If one is left out, the features move by what
    it is off; the sum over the units estimates the error of all (the jackknife, White's HC3). It sees whatever differs
    from unit to unit: noise, pruning, wrong gates, images that were not found. What all units share, as a wrong scale
    or features that drifted, it does not see.

    Args:
        rows: (H, r) the first layer's summed gradient.
        errors: (N, H) back-propagated errors, gates included.
        features: (N, r) the solution.
        rest: (H,) squared norm of what `rows` leaves of each row of the gradient; None for nothing.

    Returns:
        Infinity for images without features.
    """
    active = rows.any(1)
    rest = torch.zeros_like(rows[:, 0]) if rest is None else rest
    rows, rest, errors = rows[active], rest[active], errors[:, active]
    solve = torch.linalg.pinv(errors.T)  # (N, H): features = solve @ rows
    leverage = (errors * solve).sum(0)
    left = (rows - errors.T @ features).square().sum(1) + rest
    off = left / (1 - leverage).clamp_min(1 / len(rows)).square()
    size = features.norm(dim=1)
    expected = (solve.square() @ off).sqrt() / size
    return torch.where(size > LEAST_SIZE * size.max(), expected, torch.inf)
