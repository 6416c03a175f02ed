"""Attribution over rounds: images are matched from round to round, and grouped by the peer that trained on them.

A curious client that observes several rounds with different participants reads each of them by itself. An image that
leaks in several rounds has nearly the same features in each; how much the features of different images differ is known
from the images of one round, which are all different. A peer that takes part uses all its images, so images that are
always in the same rounds belong to one peer, or to peers with the same participation; these are distinguished by their
local steps, if there are several (`Leakage.peers`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.defended_head import DefendedReading, Expected, ReadAgain, Rereadable
from attack_modules.analytic.results import Leakage


@dataclass(frozen=True)
class Attribution:
    """M different images in R rounds.

    Attributes:
        identities: of each round, (N_r,) long: which of the M images each of its images is.
        presence: (R, M) bool: whether a round shows an image.
        peers: (M,) long; images with the same number belong to one peer, or to peers that cannot be distinguished.
        alike: smallest similarity at which images of different rounds were matched; 1 if none were.
        different: largest similarity of two different images. Far below `alike`, the matching is reliable.
    """

    identities: list[Tensor]
    presence: Tensor
    peers: Tensor
    alike: float
    different: float


def attribute(leakages: Sequence[Leakage]) -> Attribution:
    """Match images from round to round, and group them by peer.

    Similarity is the cosine between features minus the mean of all images. The threshold is half way between 1 and the
    largest similarity of two images of one round, which are known to be different.

    Args:
        leakages: of each round by itself, oldest first; the features should change little between rounds.
    """
    everything = torch.cat([leakage.features for leakage in leakages])
    seen = [F.normalize(leakage.features - everything.mean(0), dim=1) for leakage in leakages]
    within = [(unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)] for unit in seen]
    different = max([0.0, *(similarity.max().item() for similarity in within if len(similarity))])
    bar = (1 + different) / 2
    identities = [torch.arange(len(seen[0]))]
    known, alike = seen[0].clone(), 1.0  # features of each image in its latest round
    for unit in seen[1:]:
        similarity = unit @ known.T
        rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(similarity.numpy(), maximize=True))
        sure = similarity[rows, columns] > bar
        identity = torch.full((len(unit),), -1)
        identity[rows[sure]] = columns[sure]
        alike = min([alike, *similarity[rows[sure], columns[sure]].tolist()])
        similarity[rows[sure], columns[sure]] = 0.0
        different = max(different, similarity.max().item())
        known[identity[identity >= 0]] = unit[identity >= 0]
        new = identity < 0
        identity[new] = len(known) + torch.arange(int(new.sum()))
        known = torch.cat([known, unit[new]])
        identities.append(identity)
    presence = torch.zeros(len(leakages), len(known), dtype=torch.bool)
    for shown, identity in zip(presence, identities, strict=True):
        shown[identity] = True
    return Attribution(identities, presence, _group(leakages, identities, presence), alike, different)


def joined_features(features: Sequence[Tensor], attribution: Attribution) -> Tensor:
    """(M, D) mean of each image's features over the rounds that show it.

    Args:
        features: (N_r, D) of each round.
        attribution: of its images.
    """
    total = features[0].new_zeros(attribution.presence.shape[1], features[0].shape[1])
    for found, identity in zip(features, attribution.identities, strict=True):
        total[identity] += found
    return total / attribution.presence.sum(0)[:, None]


def joined_uncertainty(uncertainty: Sequence[Tensor], attribution: Attribution) -> Tensor:
    """(M,) the largest of each image over the rounds that show it; arguments as above, (N_r,)."""
    largest = torch.zeros(attribution.presence.shape[1], dtype=uncertainty[0].dtype)
    return largest.index_reduce(0, torch.cat(attribution.identities), torch.cat([*uncertainty]), "amax")


def joined_weights(weights: Sequence[Tensor | None], attribution: Attribution) -> Tensor | None:
    """(M, D) mean weight of each feature over the rounds; None if a round has none. Arguments as above, (N_r, D)."""
    return None if any(one is None for one in weights) else joined_features(weights, attribution)


@dataclass(frozen=True)
class JoinedRounds(Rereadable):
    """Rounds with different participants under a defence, each of which is read by itself.

    Attributes:
        rounds: as they were read.
        attribution: of their images.
    """

    rounds: Sequence[Rereadable]
    attribution: Attribution

    @property
    def reading(self) -> DefendedReading:
        """Of the defence, which is the same in all rounds."""
        return self.rounds[0].reading

    def again(self, expected: Expected) -> ReadAgain:
        found = [
            round_.again(replace(expected, features=expected.features[shown], error=expected.error[shown]))
            for round_, shown in zip(self.rounds, self.attribution.identities, strict=True)
        ]
        return ReadAgain(
            joined_features([one.features for one in found], self.attribution),
            joined_uncertainty([one.uncertainty for one in found], self.attribution),
            joined_weights([one.weights for one in found], self.attribution),
        )


def joined_labels(leakages: Sequence[Leakage], attribution: Attribution) -> Tensor:
    """(M,) each image's most frequent label over the rounds that show it, of equally frequent ones the smallest."""
    identities = torch.cat(attribution.identities)
    labels = torch.cat([leakage.labels for leakage in leakages])
    return torch.stack([labels[identities == image].mode().values for image in range(attribution.presence.shape[1])])


def _group(leakages: Sequence[Leakage], identities: list[Tensor], presence: Tensor) -> Tensor:
    """(M,) peers: images that are in the same rounds, and in most of these were found to be of one peer."""
    count = presence.shape[1]
    votes = torch.zeros(count, count)
    for leakage, identity in zip(leakages, identities, strict=True):
        votes[identity[:, None], identity] += (leakage.peers[:, None] == leakage.peers).float()
    shown = presence.sum(0)
    same_rounds = (presence[:, :, None] == presence[:, None]).all(0)
    together = same_rounds & (votes > shown[:, None] / 2)
    return torch.from_numpy(connected_components(together.numpy(), directed=False)[1]).long()
