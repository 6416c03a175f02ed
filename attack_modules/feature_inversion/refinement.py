"""Refinement: leaked features are corrected until the simulated update of all local steps is the observed one."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from attack_modules.analytic.gates import regress_features
from attack_modules.analytic.row_space import row_coordinates
from attack_modules.feature_inversion.drift import SimulatedRound
from attack_modules.threat_model.requirements import FullBatches, Requirement
from fl_lightning.errors import SettingError

TOLERANCE = 1.05
"""Factor on the least residual above which a refinement counts as diverging. Where refinement works, the residual falls
and finally fluctuates by 3 %."""


class Refinement(nn.Module):
    """Matches the leaked features to all local steps of the whole model, instead of to the head's training alone.

    The closed form takes features as constant while the peers train. Where they drift (a large rate, many local steps),
    its gates and features are wrong by more than the observation compels. Here the peers' training is simulated exactly
    on the current images, and the difference between the observed and the simulated update of the head's first layer
    is given back to the features: `update ~ errors^T features`, so a linear solve distributes it. This is a
    Gauss-Newton step of matching the update of all local steps without second derivatives; its fixed point is an exact
    match. With one local step the closed form is exact already, and nothing changes.

    Images that share their class differ by their activation patterns alone, which half-found images do not have right;
    their features stay as they leaked. If the images explain the update worse after a refinement than before (because
    peers are misattributed, for instance), the best features so far are restored and refinement stops.

    Args:
        resimulations: how often, evenly spread over the steps, the training is simulated and matched. Each time starts
            from better images: at a drift of 7 %, 6 times gain 1.1 dB over 3, and 11 another 0.3.
    """

    def __init__(self, resimulations: int = 8) -> None:
        super().__init__()
        if resimulations < 1:
            raise SettingError(f"`refinement.resimulations` is {resimulations}, but at least one is needed.")
        self.resimulations = resimulations

    def requirements(self) -> list[Requirement]:
        """Full batches: which images share a mini-batch is unknown."""
        return [FullBatches()]

    def start(self, leaked: Tensor, labels: Tensor) -> None:
        """Begin with the leaked features (N, D) of images with these labels (N,)."""
        self.register_buffer("target_features", leaked.clone())  # (N, D) mean over the local steps
        self.register_buffer("best_features", leaked.clone())  # those whose images explained the update best
        self.register_buffer("best_residual", torch.tensor(torch.inf))  # share of the update left unexplained by them
        self.register_buffer("stopped", torch.tensor(False))
        self.unique_class = labels.bincount()[labels] == 1  # (N,) bool

    def refine(self, rounds: Sequence[SimulatedRound], observed: Tensor, means: Tensor, step: int) -> Tensor:
        """The refined features.

        Args:
            rounds: the peers' training, simulated on the current images.
            observed: (R * H, D) the observed updates of the head's first layer, round under round.
            means: (N, D) mean of each image's simulated features over the local steps.
            step: number of the attack's step, for the warning.

        Returns:
            (N, D) features as they should have leaked.
        """
        unique = self.unique_class.to(means.device)
        if self.stopped or not unique.any():
            return self.target_features
        missing = observed - torch.cat([round_.update.dense() for round_ in rounds])
        residual = missing.norm() / observed.norm()
        if residual > TOLERANCE * self.best_residual:
            rank_zero_warn(
                f"Refinement stops at step {step}: its images leave {residual:.1%} of the update of the head's first "
                f"layer unexplained, more than the {self.best_residual:.1%} before, whose features are restored. The "
                "peers may be misattributed, or their training not as assumed."
            )
            self.stopped.fill_(True)
            return self.target_features.copy_(self.best_features)
        if residual < self.best_residual:
            self.best_residual.copy_(residual)
            self.best_features.copy_(self.target_features)
        errors = torch.cat([round_.errors for round_ in rounds], 1)
        self.target_features[unique] = (means + solve_robustly(errors, missing).to(means))[unique]
        return self.target_features

    def introduction(self) -> str:
        """What is refined, in one line."""
        return (
            f"Refinement: {int(self.unique_class.sum())} images, alone in their class, are matched to the update of "
            f"all local steps {self.resimulations} times."
        )


def solve_robustly(errors: Tensor, update: Tensor) -> Tensor:
    """Features with `errors^T features ~ update`, where units that contradict the others weigh less.

    Args:
        errors: (N, H).
        update: (H, D).

    Returns:
        (N, D) float64.
    """
    update, errors = update.double(), errors.double()
    rows, mixing = row_coordinates(update)
    return regress_features(rows, errors, torch.zeros_like(errors), noise=0.0) @ mixing @ update
