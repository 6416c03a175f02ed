"""Closed-form leakage, refined until the simulated update is the observed one."""

import torch
from torch import Tensor

from attack_modules.feature_drift import SimulatedTraining
from attack_modules.feature_inversion import FeatureInversion
from attack_modules.gates import regress_features
from attack_modules.priors import Prior


class RefinedInversion(FeatureInversion):
    """Feature inversion whose features are made to agree with all local steps of the whole model, not the head alone.

    The leakage takes features as constant while the peers train. Where they drift (a large rate, many local steps) its
    gates, and so its features, are wrong by more than the data compel. Here the peers' training is simulated exactly
    on the images so far, and what the simulated update of the head's first layer lacks of the observed one is given
    back to the features: `update ~ errors^T features`, so a linear solve says to which. This is a Gauss-Newton step of
    matching the update of all local steps; it needs no second derivatives, and its fixed point is an exact match.

    With one local step the leakage is exact already, and nothing changes.

    Args:
        lr: the attacker's own learning rate, of Adam on the pixels, with cosine decay to zero.
        priors: penalties that are added to the relative feature error; null for `ChromaTotalVariation`.
        anneal: factor on the priors' weights at the first and at the last step, geometric between.
        betas: of Adam.
        subtract_own: take the attacker's own update out of the aggregate first.
        resimulations: times, spread evenly over the steps, at which the training is simulated and matched.
        chunk_size: images that are passed through the model at once, which bounds memory.
        checkpoint_every: steps between checkpoints.
    """

    def __init__(
        self,
        lr: float = 0.8,
        priors: list[Prior] | None = None,
        anneal: tuple[float, float] = (1.0, 0.01),
        betas: tuple[float, float] = (0.8, 0.99),
        subtract_own: bool = True,
        resimulations: int = 3,
        chunk_size: int = 16,
        checkpoint_every: int = 25,
    ) -> None:
        super().__init__(lr, priors, anneal, betas, subtract_own, resimulations, chunk_size, checkpoint_every)

    def leaked_features(self, rounds: list[SimulatedTraining]) -> Tensor:
        first = "head.0.weight"
        observed = [self.update_of(observation)[first].to(self.device) for observation in self.observations]
        lacking = torch.cat([update - round_.update for update, round_ in zip(observed, rounds, strict=True)])
        errors = torch.cat([round_.errors for round_ in rounds], 1)
        means = self._mean_features(rounds)
        return means + solve_robustly(errors, lacking).to(means)

    def introduction(self) -> str:
        return (
            f"{super().introduction()}\nRefined by matching the update of all {self.steps} local steps, "
            f"{self.resimulations} times."
        )


def solve_robustly(errors: Tensor, update: Tensor) -> Tensor:
    """(N, D) features with `errors^T features ~ update`, float64.

    Hidden units whose gate is misjudged contradict the others, and weigh less (`regress_features`).

    Args:
        errors: (N, H).
        update: (H, D).
    """
    basis, rows = torch.linalg.qr(update.double().T)
    errors = errors.double()
    return regress_features(rows.T, errors, torch.zeros_like(errors), noise=0.0) @ basis.T
