"""Partitions: disjoint, of exact sizes, and of the mixtures they promise."""

import pytest
import torch
from torch import Tensor

from fl_lightning.data import IID, ByClass, Dirichlet, InOrder, Partition

LABELS = torch.arange(10).repeat(60)
PARTITIONS = [InOrder(), IID(), Dirichlet(0.3), Dirichlet(1e-4), Dirichlet(1e100), ByClass(4)]


def deal(
    partition: Partition, sizes: list[int] | None, num_clients: int, labels: Tensor = LABELS, seed: int = 0
) -> list[Tensor]:
    return partition(labels, sizes, num_clients, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: type(p).__name__)
def test_sizes_are_met_exactly_and_shares_are_disjoint(partition: Partition) -> None:
    shares = deal(partition, [30, 7, 50, 1, 0], 5)
    assert [len(share) for share in shares] == [30, 7, 50, 1, 0]
    assert all(share.dtype == torch.long for share in shares)
    assert len(torch.cat(shares).unique()) == 88


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: type(p).__name__)
def test_without_sizes_all_images_are_dealt_and_nobody_is_empty(partition: Partition) -> None:
    shares = deal(partition, None, 7)
    assert min(len(share) for share in shares) > 0
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(600))


@pytest.mark.parametrize("partition", PARTITIONS[1:], ids=lambda p: type(p).__name__)
def test_the_generator_decides(partition: Partition) -> None:
    first, again, other = (torch.cat(deal(partition, [20] * 5, 5, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_chance_is_left_alone() -> None:
    state = torch.get_rng_state()
    for partition in PARTITIONS:
        deal(partition, None, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_in_order() -> None:
    assert [share.tolist() for share in deal(InOrder(), [2, 3], 2)] == [[0, 1], [2, 3, 4]]
    assert [len(share) for share in deal(InOrder(), None, 5, labels=torch.zeros(16))] == [4, 3, 3, 3, 3]


def test_dirichlet_mixes_more_for_larger_alpha() -> None:
    def classes_held(alpha: float) -> float:
        shares = deal(Dirichlet(alpha), [40] * 10, 10)
        return sum(len(LABELS[share].unique()) for share in shares) / 10

    assert classes_held(0.1) < 3 < 7 < classes_held(100)


def test_dirichlet_approaches_the_mixture_of_the_dataset() -> None:
    labels = torch.tensor([0] * 3000 + [1] * 1000)
    shares = deal(Dirichlet(1e6), [500] * 4, 4, labels)
    assert [(labels[share] == 1).double().mean().item() for share in shares] == pytest.approx([0.25] * 4, abs=0.07)


def test_dirichlet_survives_labels_with_gaps() -> None:
    assert len(torch.cat(deal(Dirichlet(0.5), None, 3, labels=torch.tensor([5, 5, 999, 5, 42, 999])))) == 6


def test_by_class_gives_few_classes_and_equally_many_images_of_each() -> None:
    shares = deal(ByClass(2), [10] * 5, 5)
    counts = [LABELS[share].unique(return_counts=True) for share in shares]
    assert [count.tolist() for _, count in counts] == [[5, 5]] * 5
    assert len(torch.cat([classes for classes, _ in counts]).unique()) == 10  # nothing shared before all are dealt


def test_by_class_shares_a_class_among_its_holders() -> None:
    shares = deal(ByClass(1), None, 20)
    assert [len(share) for share in shares] == [30] * 20
    assert all(len(LABELS[share].unique()) == 1 for share in shares)


def test_by_class_leaves_out_classes_that_nobody_holds() -> None:
    assert [len(share) for share in deal(ByClass(2), None, 3)] == [120] * 3


def test_too_few_images_are_counted() -> None:
    with pytest.raises(ValueError, match=r"There are 600 images, but 3 clients need 700 \(300, 300, 100\)"):
        deal(InOrder(), [300, 300, 100], 3)
    with pytest.raises(ValueError, match=r"need 900 \(9, 9, 9, 9, 9, 9, 9, 9, \.\.\.\)\."):
        deal(InOrder(), [9] * 100, 100)
    with pytest.raises(ValueError, match="There are 3 images for 5 clients, so some would have none"):
        deal(IID(), None, 5, labels=torch.zeros(3))


def test_by_class_refuses_what_its_classes_cannot_give() -> None:
    with pytest.raises(ValueError, match=r"Class \d has 60 images, but 1 client would need 61"):
        deal(ByClass(1), [61], 1)
    with pytest.raises(ValueError, match="is 11, but the images have only 10 classes"):
        deal(ByClass(11), None, 2)
    with pytest.raises(ValueError, match="would have no images, because its classes have fewer images than clients"):
        deal(ByClass(1), None, 3, labels=torch.tensor([0, 1, 1, 1]))


def test_settings_out_of_range_are_refused() -> None:
    for alpha in (0, 1e101):
        with pytest.raises(ValueError, match="a Dirichlet concentration must be positive and at most 1e100"):
            Dirichlet(alpha)
    with pytest.raises(ValueError, match="is 0, but a client needs at least one class"):
        ByClass(0)
