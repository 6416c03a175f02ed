"""Rounds of a head over a frozen backbone, read together."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.drifting_peers import HeadSteps, coupling_of
from attack_modules.analytic.noisy_gates import NoisyGates
from attack_modules.analytic.results import TrainingKnowledge
from attack_modules.analytic.stacked_rounds import FoundImages
from attack_modules.attack import AttackError
from attack_modules.feature_inversion import frozen_backbone
from attack_modules.feature_inversion.frozen_backbone import (
    FrozenBackbone,
    HeadAlone,
    PlainSGD,
    peers_of,
    refuse_few_zeros,
)
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.observed import RoundsSummary
from fl_lightning.client import Tensors
from fl_lightning.errors import SettingError
from fl_lightning.models import EfficientNetLite0, LeNet5, TorchvisionClassifier

CLASSES, WIDTH, RATE = 4, 64, 0.05
PARTS = ("weight", "bias")
LABELS = torch.tensor([0, 1, 0, 2, 1, 3, 0, 2, 1])


def federate(rectified: bool) -> tuple[Tensor, list[Tensors], list[Tensors]]:
    """Features (9, D), and the head's updates and weights in each of 12 rounds."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(len(LABELS), WIDTH, generator=generator) + 0.5 * torch.randn(WIDTH, generator=generator)
    own = own.relu() if rectified else own
    features = 12 * own / own.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(1)
    weight, bias = 0.1 * torch.randn(CLASSES, WIDTH, generator=generator), torch.zeros(CLASSES)
    updates, weights = [], []
    for _ in range(12):
        errors = ((features @ weight.T + bias).softmax(1) - F.one_hot(LABELS, CLASSES)) / len(LABELS)
        after = weight - RATE * errors.T @ features, bias - RATE * errors.sum(0)
        weights.append({"head.0.weight": weight, "head.0.bias": bias})
        updates.append({"head.0.weight": weight - after[0], "head.0.bias": bias - after[1]})
        weight, bias = after
    return features, updates, weights


@pytest.fixture(scope="module")
def rounds() -> tuple[Tensor, list[Tensors], list[Tensors]]:
    return federate(rectified=False)


def test_images_that_share_classes_come_out_of_rounds_that_are_told_nothing(rounds: tuple) -> None:
    features, updates, weights = rounds
    reader = FrozenBackbone()
    leakage, presence = reader.read(updates, weights, [TrainingKnowledge(RATE, 1)] * 12, list(range(12)))
    errors, nearest = (torch.cdist(features, leakage.features) / 12).min(1)
    assert errors.max() < 0.01
    assert torch.equal(leakage.labels[nearest], LABELS)
    assert presence.shape == (12, 9)
    assert leakage.diagnosis.separated
    assert leakage.diagnosis.residual < 1e-4
    assert "9 images found by start" in reader.introduction()
    assert "features of 9 are certified" in reader.introduction()
    told, _ = reader.read(updates, weights, [TrainingKnowledge(RATE, 1, 9, LABELS)] * 12, list(range(12)))
    assert told.diagnosis.counted  # which does not limit the verdict, since the singular values fall there


def test_zeros_show_features_whatever_is_told_of_the_training() -> None:
    features, updates, weights = federate(rectified=True)
    batches = [TrainingKnowledge(1.0, 12, epochs=3)] * 12  # not what was done
    reader = FrozenBackbone()
    leakage, presence = reader.read(updates, weights, batches, list(range(12)))
    errors, nearest = (torch.cdist(features, leakage.features) / 12).min(1)
    assert errors.max() < 0.01
    assert torch.equal(leakage.labels[nearest], LABELS)
    assert presence.all()
    assert leakage.peers.unique().numel() == 1
    assert leakage.diagnosis.disentangled == 9
    assert "9 images found by the zeros of their features; the features of 9" in reader.introduction()


def test_peers_that_smooth_labels_and_take_part_in_some_rounds_are_told_apart() -> None:
    features = federate(rectified=True)[0].double()
    peers = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    presence = torch.ones(8, len(LABELS), dtype=torch.bool)
    presence[::2, peers == 1] = False
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1)
    weights = 0.1 * torch.randn(8, CLASSES, WIDTH + 1, generator=torch.Generator().manual_seed(2)).double()
    targets = 0.7 * F.one_hot(LABELS, CLASSES).double().T + 0.3 / CLASSES
    steps = HeadSteps(weights @ inputs.T, inputs @ inputs.T, targets, presence, RATE, 3)
    errors = steps.simulate(coupling_of(peers))[0] / presence.sum(1)[:, None, None]
    solution = FoundImages(features, torch.zeros(9), LABELS, presence, 9, "zeros")
    loss = replace(TrainingKnowledge(RATE, 3).loss, label_smoothing=0.3)
    found = peers_of(solution, weights, errors @ inputs, TrainingKnowledge(RATE, 3, epochs=3, loss=loss))
    assert found.residual < 1e-3
    assert torch.equal(found.peers[:, None] == found.peers, peers[:, None] == peers)
    assert peers_of(solution, weights, errors @ inputs, TrainingKnowledge(RATE, 3, epochs=1, loss=loss)) is None


def test_zeros_show_the_features_under_a_head_of_two_layers_and_then_labels() -> None:
    features = federate(rectified=True)[0]
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1)
    generator = torch.Generator().manual_seed(4)
    weight, last = (torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for shape in ((16, WIDTH + 1), (4, 17)))
    layers = []
    for _ in range(4):
        layers.append((weight, last))
        outputs = inputs @ weight.T
        hidden = torch.cat([outputs.relu(), torch.ones(len(outputs), 1)], 1)
        errors = ((hidden @ last.T).softmax(1) - F.one_hot(LABELS, CLASSES)) / len(LABELS)
        back = errors @ last[:, :-1] * (outputs > 0)
        weight, last = weight - RATE * back.T @ inputs, last - RATE * errors.T @ hidden
    layers.append((weight, last))
    named = [
        {
            f"head.{2 * i}.{part}": w[:, :-1] if part == "weight" else w[:, -1]
            for i, w in enumerate(pair)
            for part in PARTS
        }
        for pair in layers
    ]
    updates = [{name: before[name] - after[name] for name in before} for before, after in pairwise(named)]
    reader = FrozenBackbone()
    leakage, presence = reader.read(updates, named[:-1], [TrainingKnowledge(RATE, 1)] * 4, list(range(4)))
    distances, nearest = (torch.cdist(features, leakage.features) / 12).min(1)
    assert distances.max() < 0.01
    assert torch.equal(leakage.labels[nearest], LABELS)
    assert presence.all()
    few = replace(reader.solution, num_images=19)
    with pytest.raises(AttackError, match="show 9 of 19 images in rounds 3 to 5 of a head of several layers"):
        refuse_few_zeros(few, [3, 4, 5])


WEIGHTED = replace(TrainingKnowledge(RATE, 1).loss, class_weights=torch.ones(CLASSES))


@pytest.mark.parametrize(
    ("changed", "by"),
    [({}, "errors"), ({"steps": 2}, "zeros"), ({"epochs": 3}, "zeros"), ({"loss": WEIGHTED}, "zeros")],
)
def test_errors_are_read_of_single_full_batch_steps_alone(
    monkeypatch: pytest.MonkeyPatch, changed: dict, by: str
) -> None:
    size = frozen_backbone.DIRECT + 1
    for name, evidence in (("error_series", "errors"), ("sparse_rounds", "zeros")):
        found = SimpleNamespace(labels=range(size), evidence=evidence)
        monkeypatch.setattr(frozen_backbone, name, lambda *_, found=found: found)
    rounds = SimpleNamespace(weights=torch.zeros(size, CLASSES, size), basis=torch.zeros(size, 2 * size))
    training = [replace(TrainingKnowledge(RATE, 1), **changed)] * size
    assert FrozenBackbone()._one_by_one(rounds, training).evidence == by
    other = [*training[1:], replace(training[0], num_images=3)]
    assert FrozenBackbone()._one_by_one(rounds, other).evidence == "zeros"


def test_errors_show_images_without_zeros_which_are_too_many_to_be_solved_together(
    rounds: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_backbone, "DIRECT", 4)
    reader = FrozenBackbone()
    leakage, _ = reader.read(rounds[1], rounds[2], [TrainingKnowledge(RATE, 1)] * 12, list(range(12)))
    errors, nearest = (torch.cdist(rounds[0], leakage.features) / 12).min(1)
    assert errors.max() < 0.05
    assert torch.equal(leakage.labels[nearest], LABELS)
    assert "9 images found by the errors of each in all rounds" in reader.introduction()


def test_what_was_not_found_is_refused(rounds: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AttackError, match="errors show 0 of 9 images in rounds 0 to 11, and solved for all, they leave"
    ):
        FrozenBackbone(starts=1, iterations=2).read(
            rounds[1], rounds[2], [TrainingKnowledge(RATE, 1)] * 12, list(range(12))
        )
    told = [TrainingKnowledge(RATE, 1, 9 - number % 2) for number in range(12)]
    with pytest.raises(AttackError, match="Rounds 3 and 4 do not hold the same images"):
        FrozenBackbone().read(rounds[1], rounds[2], told, list(range(3, 15)))
    with pytest.raises(AttackError, match=r"show 0 of 9 images in rounds 0 to 11, .* mini-batches are not solved"):
        batches = [TrainingKnowledge(RATE, 4, epochs=2)] * 12
        FrozenBackbone().read(rounds[1], rounds[2], batches, list(range(12)))
    monkeypatch.setattr(frozen_backbone, "MOST", 8)
    with pytest.raises(AttackError, match="Without zeros, at most 8 images are solved"):
        FrozenBackbone().read(rounds[1], rounds[2], [TrainingKnowledge(RATE, 1)] * 12, list(range(12)))
    with (
        pytest.warns(UserWarning, match="are read as if there were none"),
        pytest.raises(AttackError, match="show no rank"),
    ):
        told = [TrainingKnowledge(RATE, 1, 9, reading=NoisyGates())]
        FrozenBackbone().read(rounds[1][:1], rounds[2][:1], told, [3])
    with pytest.raises(SettingError, match="starts >= 1"):
        FrozenBackbone(starts=0)


def test_rounds_that_train_more_than_a_layer_or_by_adam_are_named() -> None:
    shape = (3, 32, 32)
    batches = [Assumptions(client_lr=0.1, local_epochs=3, batch_size=8, momentum=0.9)]
    backbone = RoundsSummary(EfficientNetLite0(10, shape), shape, batches)
    assert HeadAlone().violation(backbone) is None
    assert PlainSGD().violation(backbone) is None
    assert "without biases" in HeadAlone().violation(RoundsSummary(LeNet5(10, shape), shape, batches))
    trained = TorchvisionClassifier(10, shape, "resnet18")
    assert "they train features." in HeadAlone().violation(RoundsSummary(trained, shape, batches))
    adam = RoundsSummary(EfficientNetLite0(10, shape), shape, [Assumptions(0.1, 1, optimizer="Adam")])
    assert "by Adam" in PlainSGD().violation(adam)
