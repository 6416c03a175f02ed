"""Leaked features against those of the originals."""

import pytest
import torch

from attack_modules.evaluation.features import feature_scores, match_features


def test_share_within_one_percent_counts_originals() -> None:
    true = torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    leaked = true[[2, 0, 1]] * torch.tensor([1.005, 1.02, 1.0])[:, None]
    scores = feature_scores(leaked, true)
    assert scores["share_within_1_percent"] == 0.5
    assert scores["error_median"] == pytest.approx(0.005, rel=1e-3)
    assert scores["error_max"] > 1
    assert match_features(leaked, true).tolist() == [1, 2, 0, -1]
