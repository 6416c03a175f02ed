import pytest
import torch

from fl_lightning.aggregation import aggregate, server_step
from fl_lightning.client import ClientUpdate
from fl_lightning.server_optimizers import FedAvg


def test_fedavg_is_the_hand_computed_weighted_mean() -> None:
    clients = [
        ClientUpdate({"w": torch.tensor([1.0, 2.0])}, {"running_mean": torch.tensor(8.0)}, 1),
        ClientUpdate({"w": torch.tensor([3.0, -2.0])}, {"running_mean": torch.tensor(0.0)}, 3),
        ClientUpdate({"w": torch.tensor([0.0, 6.0])}, {"running_mean": torch.tensor(2.0)}, 4),
    ]
    mean = aggregate(iter(clients))
    # (1 * 1 + 3 * 3 + 4 * 0) / 8, (1 * 2 - 3 * 2 + 4 * 6) / 8; (8 + 0 + 8) / 8
    torch.testing.assert_close(mean.update["w"], torch.tensor([1.25, 2.5]))
    torch.testing.assert_close(mean.buffers["running_mean"], torch.tensor(2.0))
    assert mean.num_examples == 8
    before = {"w": torch.tensor([10.0, 10.0]), "frozen": torch.ones(1)}
    after = server_step(before, mean.update, 0.5, FedAvg(), {}, 0)
    torch.testing.assert_close(after, {"w": torch.tensor([9.375, 8.75]), "frozen": torch.ones(1)})
    torch.testing.assert_close(clients[0].update["w"], torch.tensor([1.0, 2.0]))  # inputs are left alone


def test_integer_buffers_are_not_averaged() -> None:
    clients = [ClientUpdate({}, {"num_batches_tracked": torch.tensor(3)}, n) for n in (1, 2)]
    assert aggregate(clients).buffers["num_batches_tracked"].item() == 3


EMPTY = ClientUpdate({"w": torch.tensor([9.0])}, {}, 0)


@pytest.mark.parametrize("clients", [[], [EMPTY, EMPTY]])
def test_nobody_to_aggregate_is_refused(clients: list[ClientUpdate]) -> None:
    with pytest.raises(ValueError, match="No client with images"):
        aggregate(clients)


def test_a_client_without_images_has_no_weight() -> None:
    one = ClientUpdate({"w": torch.tensor([1.0])}, {}, 2)
    assert aggregate([EMPTY, one, EMPTY]).update["w"].item() == 1.0
