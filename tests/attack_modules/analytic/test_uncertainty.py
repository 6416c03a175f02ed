import pytest
import torch

from attack_modules.analytic.uncertainty import feature_uncertainty


@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_expected_error_is_the_error_that_noise_makes(noise: float) -> None:
    torch.manual_seed(0)
    errors = torch.randn(6, 200, dtype=torch.float64) * torch.logspace(0, -1.5, 6, dtype=torch.float64)[:, None]
    features = torch.rand(6, 50, dtype=torch.float64)
    rows = errors.T @ features + noise * torch.randn(200, 50, dtype=torch.float64)
    rows = torch.cat([rows, torch.zeros(30, 50, dtype=torch.float64)])  # of units that were never active
    errors = torch.cat([errors, torch.randn(6, 30, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(errors[:, :200].T, rows[:200]).solution
    true = (solved - features).norm(dim=1) / features.norm(dim=1)
    expected = feature_uncertainty(rows, errors, solved)
    assert ((expected / true - 1).abs() < 0.35).all()


def test_an_image_that_is_missing_makes_the_others_uncertain() -> None:
    torch.manual_seed(0)
    errors, features = torch.rand(6, 200, dtype=torch.float64), torch.rand(6, 50, dtype=torch.float64)
    rows = errors.T @ features
    whole = feature_uncertainty(rows, errors, features)
    part = feature_uncertainty(rows, errors[:5], torch.linalg.lstsq(errors[:5].T, rows).solution)
    assert whole.max() < 1e-6
    assert part.min() > 0.02


def test_an_image_that_no_unit_shows_is_unknown() -> None:
    torch.manual_seed(0)
    errors, features = torch.rand(3, 50, dtype=torch.float64), torch.rand(3, 20, dtype=torch.float64)
    errors[1], features[1] = 0, 0
    found = feature_uncertainty(errors.T @ features, errors, features)
    assert found[1] == torch.inf
    assert found[[0, 2]].max() < 1e-6
