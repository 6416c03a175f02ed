"""Heads of more than two linear layers, as of AlexNet and VGG: read down from the last layer."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.analytic import row_space
from attack_modules.analytic.head_training import simulate
from attack_modules.analytic.leak import leak, leak_rounds
from attack_modules.analytic.results import TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace, augmented
from attack_modules.attack import AttackError

CLASSES, WIDTH = 30, 80
LABELS = torch.arange(0, 24, 3)
PEERS = torch.arange(8) // 4


def make_head(*hidden: int, dropout: tuple[float, ...] = (), bias: bool = True) -> nn.Sequential:
    """Float32, as models are, so that updates are rounded."""
    torch.manual_seed(0)
    sizes = (WIDTH, *hidden, CLASSES)
    rates = dropout or (0.0,) * (len(sizes) - 1)
    layers = [
        layer
        for rate, (inner, outer) in zip(rates, pairwise(sizes), strict=True)
        for layer in (nn.ReLU(), nn.Dropout(rate), nn.Linear(inner, outer, bias=bias))
    ]
    return nn.Sequential(*layers)


def make_features(count: int = 8) -> Tensor:
    return torch.rand(count, WIDTH, generator=torch.Generator().manual_seed(1))


def train(head: nn.Sequential, features: Tensor, lr: float, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean of the peers' updates after full-batch SGD, and the weights before."""
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in before.items()}
    for peer in PEERS.unique():
        own = peer == PEERS
        head.load_state_dict(before)
        optimizer = torch.optim.SGD(head.parameters(), lr)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(head(features[own]), LABELS[own]).backward()
            optimizer.step()
        for name, parameter in head.named_parameters():
            total[name] += (before[name] - parameter.detach()) / len(PEERS.unique())
    head.load_state_dict(before)
    return total, before


def errors_of(found: Tensor, features: Tensor) -> Tensor:
    return (found - features).norm(dim=1) / features.norm(dim=1)


@pytest.mark.parametrize("hidden", [(64, 56), (64, 56, 48)], ids=["three layers", "four layers"])
@pytest.mark.parametrize(("steps", "lr", "error"), [(1, 0.1, 1e-4), (3, 0.02, 2e-3)])
def test_features_and_peers_are_read(hidden: tuple[int, ...], steps: int, lr: float, error: float) -> None:
    features = make_features()
    found = leak(*train(make_head(*hidden), features, lr, steps), TrainingKnowledge(lr, steps))
    assert found.labels.tolist() == LABELS.tolist()
    assert found.diagnosis.num_images == len(LABELS) and found.diagnosis.counted
    assert errors_of(found.features, features).median() < error
    if steps > 1:
        assert found.peers.tolist() == PEERS.tolist()


def test_several_rounds_are_read_together() -> None:
    features, head, updates, weights = make_features(), make_head(64, 56), [], []
    for _ in range(2):
        update, before = train(head, features, lr=0.1, steps=1)
        updates.append(update)
        weights.append(before)
        head.load_state_dict({name: before[name] - update[name] for name in before})
    found = leak_rounds(updates, weights, TrainingKnowledge(0.1, 1))
    assert errors_of(found.features, features).median() < 1e-4


def test_what_dropout_kept_is_read() -> None:
    features, rates = make_features(), (0.5, 0.5, 0.0)
    training = TrainingKnowledge(0.1, 1, dropout=rates)
    found = leak(*train(make_head(256, 200, dropout=rates), features, lr=0.1, steps=1), training)
    assert 0.4 < found.seen.double().mean() < 0.6
    assert errors_of(found.features, features * found.seen).median() < 1e-4


def test_shared_classes_are_refused() -> None:
    update, before = train(make_head(64, 56), make_features(), 0.1, 1)
    with pytest.raises(AttackError, match="8 images of 7 of 30 classes"):
        leak(update, before, TrainingKnowledge(0.1, 1, labels=torch.tensor([0, 0, 3, 6, 9, 12, 15, 18])))


def test_images_as_many_as_units_are_not_read_as_if_that_were_certain() -> None:
    training = TrainingKnowledge(0.1, 1, labels=LABELS)
    with pytest.raises(AttackError, match="8 images and a layer of 8 units"):
        leak(*train(make_head(64, 8), make_features(), 0.1, 1), training)
    for units, checked in ((6, False), (64, True)):
        assert leak(*train(make_head(units), make_features(), 0.1, 1), training).diagnosis.checked is checked


@pytest.mark.parametrize("bias", [False, True])
def test_simulation_is_the_training(bias: bool) -> None:
    features, head = make_features().double(), make_head(20, 16, bias=bias).double()
    update, before = train(head, features, lr=0.5, steps=3)
    first, *upper = augmented(before)
    inputs = F.pad(features, (0, int(bias)), value=1.0)
    influence = (PEERS[:, None] == PEERS).double() / 4
    targets = F.one_hot(LABELS, CLASSES).double()
    paths = simulate(inputs @ inputs.T, inputs @ first.T, upper, targets, influence, 0.5, 3)
    gated = (paths[0].errors * (paths[0].preactivations > 0)).mean(0)
    torch.testing.assert_close(augmented(update)[0], gated.T @ inputs * 0.5 * 3 / 8)
    own = (paths[1].errors * (paths[1].preactivations > 0)).mean(0)
    torch.testing.assert_close(paths[0].residuals, own)


def test_leading_directions_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    update = torch.rand(60, 5) @ torch.rand(5, 90) + 1e-4 * torch.randn(60, 90)
    update[7] = 0  # a unit that was never active
    weight = torch.rand(60, 90)
    whole = RowSpace.of(update, weight)
    monkeypatch.setattr(row_space, "WIDE", 10)
    monkeypatch.setattr(row_space, "LEADING", 6)  # of which 6 are too few to see the end
    monkeypatch.setattr(row_space, "CHUNK", 1000)
    leading = RowSpace.of(update, weight)
    assert 6 < leading.rows.shape[1] < 60
    torch.testing.assert_close(leading.singular[:5], whole.singular[:5])
    assert not leading.rows[7].any()
    energy = leading.rows.square().sum(1) + leading.rest
    torch.testing.assert_close(energy, update.double().square().sum(1))
    basis = leading.vectors(torch.eye(leading.rows.shape[1], dtype=torch.float64))
    torch.testing.assert_close(leading.weight, weight.double() @ basis.T)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
    within = update.double() @ basis.T @ basis
    torch.testing.assert_close(leading.vectors(leading.rows), within)
    torch.testing.assert_close(leading.rest, (update - within).square().sum(1), rtol=1e-3, atol=1e-11)
    assert leading.rest.sum() > 1e-7  # which is small beside the energy
