import torch

from attack_modules.simulation.low_rank import LowRank, inner, squared_distance, squared_norm


def test_arithmetic_is_that_of_the_dense_matrix() -> None:
    torch.manual_seed(0)
    base, other = torch.randn(4, 6), torch.randn(4, 6)
    x, y = torch.randn(2, 6), torch.randn(3, 6)
    a = LowRank(base, 0.5, (torch.randn(2, 4), torch.randn(3, 4)), (x, y))
    b = LowRank(base, -1.0, (torch.randn(2, 4),), (x,))
    total = a - 3.0 * b
    dense = a.dense() - 3 * b.dense()
    torch.testing.assert_close(total.dense(), dense)
    assert len(total.right) == 2  # the shared factor is merged
    torch.testing.assert_close(total.linear(y), y @ dense.T)
    torch.testing.assert_close(inner(total, other), (dense * other).sum())
    torch.testing.assert_close(squared_norm(total), dense.square().sum())
    torch.testing.assert_close(squared_distance(total, other), (dense - other).square().sum())
    torch.testing.assert_close(squared_distance(dense, other), (dense - other).square().sum())
