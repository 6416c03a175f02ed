"""Feature inversion over rounds in which different peers take part, with the peer of every image."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from attack_modules.analytic.leak import leak
from attack_modules.analytic.peer_attribution import Attribution, attribute, joined_features, joined_labels
from attack_modules.analytic.results import Diagnosis, Leakage, TrainingKnowledge
from attack_modules.feature_inversion.inversion import FeatureInversion
from fl_lightning.client import Tensors

UNREAD = 0.5
"""Residual of a round that says nothing. Measured: below 0.05 where images came out, 0.97 where they did not."""


class AttributedInversion(FeatureInversion):
    """Feature inversion of several rounds that different peers took part in.

    Every observed round is read by itself; images are recognised from round to round, and grouped by peer
    (`analytic.peer_attribution`). Each image is then recovered once, from the mean of the features that leaked in
    the rounds that show it. What the model's change from round to round adds to them is simulated with the rest of
    the drift, so `resimulations` should not be 0. The settings are those of `FeatureInversion`.
    """

    attribution: Attribution

    def leak(
        self, updates: Sequence[Tensors], weights: Sequence[Tensors], beliefs: Sequence[TrainingKnowledge]
    ) -> tuple[Leakage, Tensor]:
        rounds = [leak(*seen) for seen in zip(updates, weights, beliefs, strict=True)]
        for observation, found in zip(self.observations, rounds, strict=True):
            if found.diagnosis.residual > UNREAD:
                rank_zero_warn(
                    f"Round {observation.round} could not be read: {found.diagnosis.residual:.0%} of its update is "
                    "left unexplained, and what is taken for its images spoils the recognition of the others'. "
                    "Leave it out of `federation.observed_rounds`."
                )
        self.attribution = attribute(rounds)
        presence = self.attribution.presence
        joined = Leakage(
            labels=joined_labels(rounds, self.attribution),
            features=joined_features(rounds, self.attribution),
            peers=self.attribution.peers,
            diagnosis=worst([found.diagnosis for found in rounds], presence.shape[1]),
        )
        return joined, presence

    def introduction(self) -> str:
        found, shown = self.attribution, ", ".join(str(int(count)) for count in self.presence.sum(1))
        patterns = len(self.presence.unique(dim=1).T)
        unseen = (
            "Two peers that took part in just the same rounds count as one here: one local step leaves no other trace."
            if self.steps == 1
            else "Of peers that took part in just the same rounds, only the traces of the local steps tell."
        )
        recognised = (
            f"images taken for one in two rounds have a similarity of at least {found.alike:.3f}, others of at most "
            f"{found.different:.3f}"
            if found.alike < 1
            else f"none appears twice, and their similarity is at most {found.different:.3f}"
        )
        return (
            f"{super().introduction()}\nThe rounds show {shown} images, {self.presence.shape[1]} different ones "
            f"({recognised}). They come and go in {patterns} ways, and belong to {len(found.peers.unique())} peers "
            f"as far as it shows. {unseen}"
        )


def worst(rounds: Sequence[Diagnosis], separated: int) -> Diagnosis:
    """The least trustworthy of each quantity, for `separated` different images of all rounds."""
    return Diagnosis(
        num_images=separated + max(found.num_images - found.separated for found in rounds),
        separated=separated,
        gap=min(found.gap for found in rounds),
        residual=max(found.residual for found in rounds),
        conditioning=max(found.conditioning for found in rounds),
        drift=max(found.drift for found in rounds),
        outside=max(found.outside for found in rounds),
    )
