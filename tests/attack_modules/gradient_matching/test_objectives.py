import pytest
import torch

from attack_modules.gradient_matching.objectives import Cosine, SquaredL2

A = {"conv.weight": torch.tensor([3.0, 0.0]), "head.weight": torch.tensor([[0.0, 4.0]])}
B = {"conv.weight": torch.tensor([0.0, 1.0]), "head.weight": torch.tensor([[2.0, 2.0]])}


def test_values_computed_by_hand() -> None:
    # |A - B|^2 = 9 + 1 + 4 + 4, |B|^2 = 1 + 4 + 4; <A, B> = 8, |A| = 5, |B| = 3
    torch.testing.assert_close(SquaredL2()(A, B), torch.tensor(18 / 9))
    torch.testing.assert_close(Cosine()(A, B), torch.tensor(1 - 8 / 15))


def test_layer_weights_by_hand() -> None:
    # conv counts 2, head 0.5: (2 * 10 + 0.5 * 8) / (2 * 1 + 0.5 * 8)
    torch.testing.assert_close(SquaredL2({"conv": 2.0, "head": 0.5})(A, B), torch.tensor(24 / 6))
    torch.testing.assert_close(SquaredL2({"conv": 0.0})(A, B), torch.tensor(8 / 8))


@pytest.mark.parametrize("objective", [SquaredL2(), Cosine()])
def test_zero_at_the_truth(objective: SquaredL2 | Cosine) -> None:
    torch.testing.assert_close(objective(A, A), torch.tensor(0.0))


def test_cosine_does_not_see_length() -> None:
    torch.testing.assert_close(Cosine()({name: 7 * a for name, a in A.items()}, B), Cosine()(A, B))


def test_mistyped_and_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names 'fc', but no parameter starts so; there are conv\.weight"):
        SquaredL2({"fc": 1.0})(A, B)
    with pytest.raises(ValueError, match="leaves no parameter to compare"):
        SquaredL2({"conv": 0.0, "head": 0.0})(A, B)
    with pytest.raises(ValueError, match="must not be negative"):
        Cosine({"conv": -1.0})
