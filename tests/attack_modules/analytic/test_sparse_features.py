"""Sparse features found in the row space of an update, whatever the gates and classes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.row_space import RowSpace
from attack_modules.analytic.sparse_features import sparser, sparsest_features, zeros_of


def alike(count: int, least: float) -> Tensor:
    """(count, 600) features that are much alike, those below `least` set to it."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(n, 600, generator=generator, dtype=torch.float64) for n in (1, count))
    return (common + 0.4 * own).clamp_min(least)


def space_of(features: Tensor) -> RowSpace:
    """Of an update of 40 units, each of which shows some sum of the features."""
    generator = torch.Generator().manual_seed(1)
    errors = torch.randn(len(features), 40, generator=generator, dtype=torch.float64)
    return RowSpace.of(errors.T @ features, torch.zeros(40, features.shape[1]))


def test_features_with_zeros_are_told_apart_by_them() -> None:
    features = alike(8, 0.0)
    space = space_of(features)
    found = sparsest_features(space, len(features))
    distance = torch.cdist(F.normalize(space.vectors(found), dim=1), F.normalize(features, dim=1))
    assert sorted(distance.argmin(1).tolist()) == list(range(len(features)))
    assert distance.amin(1).max() < 0.02


def test_features_without_zeros_are_not_found() -> None:
    features = alike(4, -4.0) + 5
    space = space_of(features)
    assert len(sparsest_features(space, len(features))) == 0
    assert zeros_of(space, space.coordinates(features)).max() < 0.1


def test_rows_that_are_alike_to_float32_are_no_singular_matrix() -> None:
    """As of rounds in which different clients trained, whose equations weigh next to nothing."""
    basis = torch.ones(2, 3)
    assert sparser(basis, torch.eye(2), (0.1, 0.01)).isfinite().all()
