"""Closed-form leakage, refined until the simulated update is the observed one."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from attack_modules.analytic.gates import regress_features
from attack_modules.analytic.row_space import row_coordinates
from attack_modules.feature_inversion.drift import SimulatedRound
from attack_modules.feature_inversion.inversion import FeatureInversion
from fl_lightning.errors import SettingError
from fl_lightning.models import FIRST_LAYER

WORSE = 1.05
"""Times the least share of the update left unexplained, above which a refinement leads away. Where it works, the share
falls, and at last wavers by 3 %."""


class RefinedInversion(FeatureInversion):
    """Feature inversion whose features are made to agree with all local steps of the whole model, not the head alone.

    The leakage takes features as constant while the peers train. Where they drift (a large rate, many local steps) its
    gates, and so its features, are wrong by more than the data compel. Here the peers' training is simulated exactly
    on the images so far, and what the simulated update of the head's first layer lacks of the observed one is given
    back to the features: `update ~ errors^T features`, so a linear solve says to which. This is a Gauss-Newton step of
    matching the update of all local steps; it needs no second derivatives, and its fixed point is an exact match.

    With one local step the leakage is exact already, and nothing changes. Peers that train in mini-batches are refused:
    which images share one is unknown.

    Images that share their class differ by their gates alone, and images half found have not the right ones: their
    features stay as they leaked. Where the images agree less with the update after a refinement than before (peers are
    misjudged, say), it goes back to the features that agreed best, and there are no further ones.

    Args:
        resimulations: times, spread evenly over the steps, at which the training is simulated and matched. Each begins
            from better images: where activations drift by 7 %, 6 make 1.1 dB more than 3, and 11 another 0.3.
        settings: those of `FeatureInversion`.
    """

    def __init__(self, *, resimulations: int = 8, **settings: Any) -> None:
        super().__init__(resimulations=resimulations, **settings)

    def configure_model(self) -> None:
        beliefs = self.observations[0].beliefs
        if not beliefs.in_full_batches:
            raise SettingError(
                f"The peers train in batches of {beliefs.batch_size}, but `RefinedInversion` matches training on full "
                "batches: which images share a batch is unknown. Use `FeatureInversion` (configs/leakage.yaml)."
            )
        super().configure_model()
        if not hasattr(self, "sought"):
            leaked = self.leakage.features
            self.register_buffer("sought", leaked.clone())  # (N, D) mean over the local steps
            self.register_buffer("trusted", leaked.clone())  # the last of them that brought images nearer
            self.register_buffer("lacking", torch.tensor(torch.inf))  # share of the update that these left unexplained
            self.register_buffer("ended", torch.tensor(False))

    @property
    def alone(self) -> Tensor:
        """(N,) bool: whether no other image has the image's label."""
        return self.labels.bincount()[self.labels] == 1

    def training_step(self, batch: int, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if self.lacking.isfinite():
            self.log("update_lacking", self.lacking)

    def leaked_features(self, rounds: list[SimulatedRound]) -> Tensor:
        if self.ended or not self.alone.any():
            return self.sought
        observed = [self.update_of(observation)[FIRST_LAYER].to(self.device) for observation in self.observations]
        missing = torch.cat([update - round_.update.dense() for update, round_ in zip(observed, rounds, strict=True)])
        lacking = missing.norm() / torch.cat(observed).norm()
        if lacking > WORSE * self.lacking:
            rank_zero_warn(
                f"Refinement ends at step {self.global_step}: its images leave {lacking:.1%} of the first head layer's "
                f"update unexplained, those before {self.lacking:.1%}, to whose features it goes back. The peers that "
                "were found may not be the true ones, or the clients' training not as believed."
            )
            self.ended.fill_(True)
            return self.sought.copy_(self.trusted)
        if lacking < self.lacking:
            self.lacking.copy_(lacking)
            self.trusted.copy_(self.sought)
        errors, means = torch.cat([round_.errors for round_ in rounds], 1), self._mean_features(rounds)
        self.sought[self.alone] = (means + solve_robustly(errors, missing).to(means))[self.alone]
        return self.sought

    def introduction(self) -> str:
        return (
            f"{super().introduction()}\nRefined by matching the update of all {self.steps} local steps, "
            f"{self.resimulations} times: the {int(self.alone.sum())} images that are alone in their class."
        )


def solve_robustly(errors: Tensor, update: Tensor) -> Tensor:
    """(N, D) features with `errors^T features ~ update`, float64.

    Hidden units whose gate is misjudged contradict the others, and weigh less (`regress_features`).

    Args:
        errors: (N, H).
        update: (H, D).
    """
    update, errors = update.double(), errors.double()
    rows, mixing = row_coordinates(update)
    return regress_features(rows, errors, torch.zeros_like(errors), noise=0.0) @ mixing @ update
