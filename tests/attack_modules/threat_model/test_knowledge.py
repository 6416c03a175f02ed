from dataclasses import replace

import pytest
import torch

from attack_modules.threat_model.knowledge import Knowledge, KnowledgeError
from fl_lightning.client import LocalTraining
from fl_lightning.truth import Truth


@pytest.fixture
def truth() -> Truth:
    return Truth(
        pixels=torch.zeros(5, 3, 8, 8, dtype=torch.uint8),
        labels=torch.tensor([4, 1, 1, 0, 2]),
        clients=torch.tensor([0, 0, 3, 3, 3]),
        training=LocalTraining(lr=0.01, local_epochs=2, batch_size=3, momentum=0.5),
        server_lr=0.7,
        class_names=[str(i) for i in range(5)],
        imagenet_labels=False,
    )


def test_all_known_is_the_truth(truth: Truth) -> None:
    assumptions = Knowledge().assumptions(truth)
    assert (assumptions.labels, assumptions.client_sizes, assumptions.num_images) == ([4, 1, 1, 0, 2], [2, 3], 5)
    assert (assumptions.client_lr, assumptions.server_lr, assumptions.local_epochs, assumptions.batch_size) == (
        0.01,
        0.7,
        2,
        3,
    )
    assert set(Knowledge().sources.values()) == {"known"}


def test_counts_alone_do_not_tell_whose_image_it_is(truth: Truth) -> None:
    knowledge = Knowledge(labels="inferred")
    assert knowledge.assumptions(truth).labels == [0, 1, 1, 2, 4]
    assert knowledge.sources["labels"] == "inferred"


def test_nothing_known_but_guesses(truth: Truth) -> None:
    knowledge = Knowledge("inferred", "inferred", 7, 2, client_lr=0.5, server_lr=1.0, local_epochs=1, batch_size=None)
    assumptions = knowledge.assumptions(truth)
    assert (assumptions.labels, assumptions.num_images, assumptions.client_sizes) == (None, 7, [4, 3])
    assert (assumptions.client_lr, assumptions.local_epochs, assumptions.batch_size) == (0.5, 1, None)
    assert knowledge.sources["client_lr"] == "guessed"
    assert knowledge.assumptions(None).num_images == 7  # no truth is needed


def test_no_truth_no_known(truth: Truth) -> None:
    with pytest.raises(KnowledgeError, match="no truth lies beside this Observation"):
        Knowledge().assumptions(None)


def test_contradictions_and_nonsense_are_refused() -> None:
    with pytest.raises(KnowledgeError, match="known labels, label counts or clients tell it"):
        Knowledge(num_images=3)
    for nonsense in (-1.0, float("nan"), float("inf")):
        with pytest.raises(KnowledgeError, match="must be positive"):
            Knowledge(client_lr=nonsense)
    with pytest.raises(
        KnowledgeError, match=r"`knowledge.momentum` is guessed as 1\.0, but it is at least 0 and below 1"
    ):
        Knowledge(momentum=1.0)


def test_sizes_of_clients_tell_the_number_of_images(truth: Truth) -> None:
    knowledge = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred")
    assert knowledge.sources["num_images"] == "known"
    assert knowledge.assumptions(truth).num_images == 5


def test_momentum_of_another_system_is_stated_or_none() -> None:
    foreign = {"labels": "inferred", "label_counts": "inferred", "num_images": "inferred", "num_clients": "inferred"}
    rates = {"client_lr": 0.1, "server_lr": 1.0, "local_epochs": 3, "batch_size": None}
    plain = Knowledge(**foreign, **rates).assumptions(None)
    assert (plain.momentum, plain.weight_decay, plain.sources["momentum"]) == (0.0, 0.0, "guessed")
    told = Knowledge(**foreign, **rates, momentum=0.9, weight_decay=1e-4).assumptions(None)
    assert (told.momentum, told.weight_decay) == (0.9, 1e-4)


def test_whether_batches_are_full_is_unknown_without_sizes(truth: Truth) -> None:
    assert not Knowledge(batch_size=4, num_clients="inferred").assumptions(truth).in_full_batches


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_mean_rate_is_that_of_sgd(truth: Truth, momentum: float) -> None:
    assumptions = replace(Knowledge().assumptions(truth), momentum=momentum)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=assumptions.client_lr, momentum=momentum)
    assert assumptions.local_steps == 2  # epochs, of one batch: mean size 2.5, batches of 3
    assert assumptions.in_full_batches
    for _ in range(assumptions.local_steps):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert -weight.item() == pytest.approx(assumptions.mean_rate * assumptions.local_steps)


def test_steps_count_batches(truth: Truth) -> None:
    assumptions = Knowledge(batch_size=1).assumptions(truth)
    assert assumptions.local_steps == 2 * 3
    assert not assumptions.in_full_batches
    assert Knowledge(batch_size=1, num_clients="inferred").assumptions(truth).local_steps == 2
