"""Whose images are these: images recognised from round to round, and grouped by the peer that trained on them.

A curious client that watches several rounds, in which different peers take part, reads each of them by itself. An
image that leaks in several rounds has nearly the same features in each, while those of different images differ: how
much, the images of one round show, which are all different. A peer that takes part brings all its images, so images
that always come and go together belong to one peer, or to peers that do so; among these the local steps tell, where
there are several (`Leakage.peers`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.results import Leakage


@dataclass(frozen=True)
class Attribution:
    """M different images in R rounds.

    Attributes:
        identities: of each round, (N_r,) long: which of the M images each leaked one is.
        presence: (R, M) bool: which rounds show which image.
        peers: (M,) long; images with one number belong to one peer, or to peers that nothing tells apart.
        alike: smallest similarity at which two images of different rounds were taken for one; 1 if none were.
        different: largest similarity of two images that are not one. Far below `alike`, the attribution is sure.
    """

    identities: list[Tensor]
    presence: Tensor
    peers: Tensor
    alike: float
    different: float


def attribute(leakages: Sequence[Leakage]) -> Attribution:
    """Recognise images from round to round, and group them.

    Similarity is the cosine between features, less the mean of all images. The most similar two images of one round,
    which surely are different, set the bar: half way from their similarity to 1.

    Args:
        leakages: of each round by itself, oldest first; the model should not change beyond recognition between them.
    """
    everything = torch.cat([leakage.features for leakage in leakages])
    seen = [F.normalize(leakage.features - everything.mean(0), dim=1) for leakage in leakages]
    within = [(unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)] for unit in seen]
    different = max([0.0, *(similarity.max().item() for similarity in within if len(similarity))])
    bar = (1 + different) / 2
    identities = [torch.arange(len(seen[0]))]
    known, alike = seen[0].clone(), 1.0  # every image as it was last seen
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


def joined_features(leakages: Sequence[Leakage], attribution: Attribution) -> Tensor:
    """(M, D) mean of each image's features over the rounds that show it."""
    shape = (attribution.presence.shape[1], leakages[0].features.shape[1])
    total = leakages[0].features.new_zeros(shape)
    for leakage, identity in zip(leakages, attribution.identities, strict=True):
        total[identity] += leakage.features
    return total / attribution.presence.sum(0)[:, None]


def joined_labels(leakages: Sequence[Leakage], attribution: Attribution) -> Tensor:
    """(M,) each image's label in most of the rounds that show it, of several such the least."""
    identities = torch.cat(attribution.identities)
    labels = torch.cat([leakage.labels for leakage in leakages])
    return torch.stack([labels[identities == image].mode().values for image in range(attribution.presence.shape[1])])


def _group(leakages: Sequence[Leakage], identities: list[Tensor], presence: Tensor) -> Tensor:
    """(M,) peers: images that appear in the same rounds, and in most of these were trained together."""
    count = presence.shape[1]
    votes = torch.zeros(count, count)
    for leakage, identity in zip(leakages, identities, strict=True):
        votes[identity[:, None], identity] += (leakage.peers[:, None] == leakage.peers).float()
    shown = presence.sum(0)
    same_rounds = (presence[:, :, None] == presence[:, None]).all(0)
    together = same_rounds & (votes > shown[:, None] / 2)
    return torch.from_numpy(connected_components(together.numpy(), directed=False)[1]).long()
