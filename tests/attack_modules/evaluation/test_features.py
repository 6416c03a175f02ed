"""Leaked features against those of the originals."""

import pytest
import torch

from attack_modules.evaluation.features import Confirmation, feature_scores


def test_share_within_one_percent_counts_originals() -> None:
    true = torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    leaked = true[[2, 0, 1]] * torch.tensor([1.005, 1.02, 1.0])[:, None]
    scores = feature_scores(leaked, true)
    assert scores["share_within_1_percent"] == 0.5
    assert scores["error_median"] == pytest.approx(0.005, rel=1e-3)
    assert scores["error_max"] > 1


def test_members_are_confirmed_where_strangers_are_further_away() -> None:
    generator = torch.Generator().manual_seed(0)
    members, strangers = torch.randn(10, 64, generator=generator), torch.randn(90, 64, generator=generator)
    member = torch.arange(100) < 10
    exact = Confirmation.of(members, torch.cat([members * 1.001, strangers]))
    assert torch.equal(exact.nearest[:10], torch.arange(10))
    assert exact.true_positive_rate(member, 0.001) == 1
    useless = Confirmation.of(torch.randn(10, 64, generator=generator), torch.cat([members, strangers]))
    assert useless.true_positive_rate(member, 0.001) < 0.3
    half = Confirmation.of(members[:5], torch.cat([members, strangers]))
    assert 0.5 <= half.true_positive_rate(member, 0.001) < 0.8
