"""How several observed rounds are read: the same images in each, or different participants from round to round."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from attack_modules.analytic.leak_defended import leak_known
from attack_modules.analytic.peer_attribution import (
    Attribution,
    JoinedRounds,
    attribute,
    joined_features,
    joined_labels,
    joined_uncertainty,
    joined_weights,
)
from attack_modules.analytic.results import Diagnosis, Leakage, TrainingKnowledge
from attack_modules.attack import AttackError
from attack_modules.threat_model.requirements import Requirement, SameClients, TwoLayersForSeveralRounds
from fl_lightning.client import Tensors

UNREADABLE = 0.5
"""Residual above which a round was not read. Measured: below 0.05 where images came out, 0.97 where they did not."""


class RoundsReader(ABC):
    """Reads labels, features and peers from the head's updates of all observed rounds.

    Attributes:
        scaled_by_steps: whether features come out too large where more steps were taken than is known.
    """

    scaled_by_steps = True

    @abstractmethod
    def requirements(self) -> list[Requirement]:
        """What the observed rounds must be like."""

    @abstractmethod
    def read(
        self,
        updates: Sequence[Tensors],
        weights: Sequence[Tensors],
        training: Sequence[TrainingKnowledge],
        numbers: Sequence[int],
    ) -> tuple[Leakage, Tensor]:
        """The images of all rounds together, and which round shows which.

        Args:
            updates: the head's update of each round, see `leak_rounds`.
            weights: the head's parameters before each round.
            training: how the peers trained in each round.
            numbers: of the rounds, for messages.

        Returns:
            What leaked of N images, and (rounds, N) bool: whether an image is in a round.
        """

    def introduction(self) -> str:
        """What the rounds show, in one line; empty where that goes without saying."""
        return ""


def refuse_other_images(training: Sequence[TrainingKnowledge], numbers: Sequence[int]) -> None:
    """Refuse to read rounds together of which it is told that they do not hold the same images.

    Args:
        training: what is known of each round.
        numbers: of the rounds.

    Raises:
        AttackError: with the first two that differ.
    """
    told = [(t.num_images, None if t.labels is None else t.labels.sort().values.tolist()) for t in training]
    for number, images in zip(numbers, told, strict=True):
        if images != told[0]:
            raise AttackError(
                f"Rounds {numbers[0]} and {number} do not hold the same images: their told labels or numbers of images "
                "differ. Rounds are read together only if the same peers train in each; name one in "
                "`federation.observed_rounds`, or set `model.rounds: ChangingParticipants` (configs/attribution.yaml)."
            )


class SameImages(RoundsReader):
    """The same peers train on the same images in every observed round: `leak_rounds` solves all rounds together."""

    def requirements(self) -> list[Requirement]:
        return [SameClients(), TwoLayersForSeveralRounds()]

    def read(
        self,
        updates: Sequence[Tensors],
        weights: Sequence[Tensors],
        training: Sequence[TrainingKnowledge],
        numbers: Sequence[int],
    ) -> tuple[Leakage, Tensor]:
        refuse_other_images(training, numbers)
        leakage = leak_known(updates, weights, training[0])
        return leakage, torch.ones(len(updates), len(leakage.labels), dtype=torch.bool)


class ChangingParticipants(RoundsReader):
    """Different peers take part in different rounds: each round is read by itself, and images are attributed to peers.

    Images are matched from round to round by their features and grouped by peer (`analytic.peer_attribution`). Each
    image is then recovered once, from the mean of its features over the rounds that show it. The model's change from
    round to round is simulated with the rest of the drift, so `resimulations` should not be 0.
    """

    attribution: Attribution
    """Of the rounds that were read last."""

    def requirements(self) -> list[Requirement]:
        return []

    def read(
        self,
        updates: Sequence[Tensors],
        weights: Sequence[Tensors],
        training: Sequence[TrainingKnowledge],
        numbers: Sequence[int],
    ) -> tuple[Leakage, Tensor]:
        rounds = [leak_known([u], [w], known) for u, w, known in zip(updates, weights, training, strict=True)]
        for number, found in zip(numbers, rounds, strict=True):
            if found.diagnosis.residual > UNREADABLE:
                rank_zero_warn(
                    f"Round {number} could not be read: {found.diagnosis.residual:.0%} of its update is unexplained, "
                    "and its supposed images disturb the matching of the others. Leave it out of "
                    "`federation.observed_rounds`."
                )
        if any(found.mixing is not None for found in rounds):
            raise AttackError(
                "The peers mix their images anew in each round, so that no image has the same features in two. Name "
                "one round in `federation.observed_rounds` and set `model.rounds: SameImages`."
            )
        self.attribution = attribute(rounds)
        presence = self.attribution.presence
        joined = Leakage(
            labels=joined_labels(rounds, self.attribution),
            features=joined_features([found.features for found in rounds], self.attribution),
            peers=self.attribution.peers,
            diagnosis=worst([found.diagnosis for found in rounds], presence.shape[1]),
            uncertainty=joined_uncertainty([found.uncertainty for found in rounds], self.attribution),
            noisy=any(found.noisy for found in rounds),
            defended=JoinedRounds([found.defended for found in rounds], self.attribution)
            if all(found.defended for found in rounds)
            else None,
            weights=joined_weights([found.weights for found in rounds], self.attribution),
        )
        return joined, presence

    def introduction(self) -> str:
        found = self.attribution
        shown = ", ".join(str(int(count)) for count in found.presence.sum(1))
        similarity = (
            f"matched images have a similarity of at least {found.alike:.3f}, others of at most {found.different:.3f}"
            if found.alike < 1
            else f"no image appears twice; similarities are at most {found.different:.3f}"
        )
        return (
            f"Rounds: they show {shown} images, {found.presence.shape[1]} different ones ({similarity}), with "
            f"{len(found.presence.unique(dim=1).T)} patterns of participation. Peers that took part in exactly the "
            "same rounds are distinguished only by their local steps, if there are several."
        )


def worst(rounds: Sequence[Diagnosis], disentangled: int) -> Diagnosis:
    """The least trustworthy value of each quantity, for `disentangled` different images of all rounds."""
    return Diagnosis(
        num_images=disentangled + max(found.num_images - found.disentangled for found in rounds),
        disentangled=disentangled,
        gap=min(found.gap for found in rounds),
        residual=max(found.residual for found in rounds),
        conditioning=max(found.conditioning for found in rounds),
        drift=max(found.drift for found in rounds),
        outside=max(found.outside for found in rounds),
        held=max(found.held for found in rounds),
        counted=all(found.counted for found in rounds),
        views=any(found.views for found in rounds),
        compressed=any(found.compressed for found in rounds),
        shown=0 if all(found.shown <= found.num_images for found in rounds) else max(found.shown for found in rounds),
        noise=max((found.noise for found in rounds if found.noise), default=None),
    )
