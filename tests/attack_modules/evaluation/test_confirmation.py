import pytest
import torch

from attack_modules.evaluation.confirmation import Confirmation, distances
from fl_lightning.errors import SettingError


def test_members_are_nearer_than_strangers_whatever_all_have_in_common() -> None:
    torch.manual_seed(0)
    persons = torch.randn(20, 50)
    pictures = [10 + persons + 0.5 * torch.randn(20, 50) for _ in range(2)]  # most of a feature is common
    near = distances(1.01 * pictures[0][:5], pictures[1])
    found = Confirmation(near, torch.arange(20) < 5)
    assert found.area() > 0.95
    assert found.true_positive_rate(0.1) > 0.75
    assert distances(pictures[1], pictures[1]).abs().max() < 1e-6


def test_rates() -> None:
    found = Confirmation(torch.tensor([0.1, 0.5, 0.2, 0.5, 0.9, 0.6]), torch.tensor([1, 1, 0, 0, 0, 0]).bool())
    assert found.true_positive_rate(0.0) == 0.5  # only 0.1 is below the nearest stranger's 0.2
    assert found.true_positive_rate(0.25) == 0.5  # a stranger's 0.5 is the limit, at which nothing is below
    assert found.true_positive_rate(0.5) == 1.0
    assert found.true_positive_rate(1.0) == 1.0
    assert found.area() == pytest.approx((4 + 2 + 0.5) / 8)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(SettingError, match=r"features of shape \(2, 3\) cannot be compared"):
        distances(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(SettingError, match="1 candidate came"):
        distances(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(SettingError, match=r"false positive rate of -0.1 came"):
        Confirmation(torch.tensor([0.0, 1.0]), torch.tensor([True, False])).true_positive_rate(-0.1)
    with pytest.raises(SettingError, match="at least one member and one stranger"):
        Confirmation(torch.zeros(3), torch.ones(3).bool())
