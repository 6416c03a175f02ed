"""Confirmation: whether candidate images show what an aggregate was trained on, and how often that is right.

A candidate, such as another picture of a person, is compared with what leaked by its features under the observed model.
The attacker can compute the distances; only the rates need the truth. Features may be those of a whole model, of a
frozen backbone, or of the reconstructed images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_lightning.errors import SettingError


def distances(leaked: Tensor, candidates: Tensor) -> Tensor:
    """(K,) how far each candidate is from the nearest that leaked: 0 for the same, 1 for an unrelated one.

    Images of one kind share most of their features, so the mean of the candidates is subtracted from all, and the
    distance is one minus the cosine of what is left, which does not depend on the scale.

    Args:
        leaked: (N, D) features of the leaked images, of any common scale near that of the candidates.
        candidates: (K, D) features of the candidates under the same model; K > 1, most of them strangers.

    Raises:
        SettingError: shapes do not agree, or there are too few.
    """
    if leaked.ndim != 2 or candidates.ndim != 2 or leaked.shape[1] != candidates.shape[1] or not len(leaked):
        raise SettingError(
            f"Leaked features of shape {tuple(leaked.shape)} cannot be compared with candidates of shape "
            f"{tuple(candidates.shape)}. Give (N, D) and (K, D) features of one model, N at least 1."
        )
    if len(candidates) < 2:
        raise SettingError(
            f"{len(candidates)} candidate came, but what all have in common shows from 2 on. Add strangers."
        )
    mean = candidates.double().mean(0)
    unit = [torch.nn.functional.normalize(features.double() - mean, dim=1) for features in (candidates, leaked)]
    return 1 - (unit[0] @ unit[1].T).amax(1)


@dataclass(frozen=True)
class Confirmation:
    """How well distances tell candidates that are in the training data from strangers.

    Attributes:
        near: (K,) distances, see `distances`.
        member: (K,) bool, whether the candidate, or the person it shows, is in the training data.
    """

    near: Tensor
    member: Tensor

    def __post_init__(self) -> None:
        if len(self.near) != len(self.member) or not self.member.any() or self.member.all():
            raise SettingError(
                f"{len(self.near)} distances came with {len(self.member)} candidates, {int(self.member.sum())} of them "
                "members. Give as many of both, and at least one member and one stranger."
            )

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Share of the members that are nearer than all but this share of the strangers, a share in [0, 1].

        Raises:
            SettingError: it is no share.
        """
        if not 0 <= false_positive_rate <= 1:
            raise SettingError(f"A false positive rate of {false_positive_rate} came, but it is a share from 0 to 1.")
        strangers = self.near[~self.member].sort().values
        allowed = int(false_positive_rate * len(strangers))
        limit = strangers[allowed] if allowed < len(strangers) else torch.inf
        return (self.near[self.member] < limit).double().mean().item()

    def area(self) -> float:
        """Chance that a member is nearer than a stranger, ties counted half: 0.5 tells nothing, 1 everything."""
        members, strangers = self.near[self.member][:, None], self.near[~self.member]
        return ((members < strangers).double() + (members == strangers).double() / 2).mean().item()
