"""Rounds of a head over a frozen backbone, read together."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.noisy_gates import NoisyGates
from attack_modules.analytic.results import TrainingKnowledge
from attack_modules.attack import AttackError
from attack_modules.feature_inversion.frozen_backbone import FrozenBackbone, FullBatches, HeadAlone
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.observed import RoundsSummary
from fl_lightning.client import Tensors
from fl_lightning.errors import SettingError
from fl_lightning.models import EfficientNetLite0, LeNet5, TorchvisionClassifier

CLASSES, WIDTH, RATE = 4, 64, 0.05
LABELS = torch.tensor([0, 1, 0, 2, 1, 3, 0, 2, 1])


@pytest.fixture(scope="module")
def rounds() -> tuple[Tensor, list[Tensors], list[Tensors]]:
    """Features (9, D), and the head's updates and weights in each of 12 rounds."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(len(LABELS), WIDTH, generator=generator) + 0.5 * torch.randn(WIDTH, generator=generator)
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
    assert "9 of 9 images are certified" in reader.introduction()
    told, _ = reader.read(updates, weights, [TrainingKnowledge(RATE, 1, 9, LABELS)] * 12, list(range(12)))
    assert told.diagnosis.counted  # which does not limit the verdict, since the singular values fall there


def test_what_was_not_found_is_refused(rounds: tuple) -> None:
    with pytest.raises(AttackError, match="of 9 images were not found in rounds 0 to 11"):
        FrozenBackbone(starts=1, iterations=2).read(
            rounds[1], rounds[2], [TrainingKnowledge(RATE, 1)] * 12, list(range(12))
        )
    told = [TrainingKnowledge(RATE, 1, number) for number in (9, 8)]
    with pytest.raises(AttackError, match="Rounds 3 and 4 do not hold the same images"):
        FrozenBackbone().read(rounds[1][:2], rounds[2][:2], told, [3, 4])
    with (
        pytest.warns(UserWarning, match="are read as if there were none"),
        pytest.raises(AttackError, match="cannot be told apart"),
    ):
        told = [TrainingKnowledge(RATE, 1, 9, reading=NoisyGates())]
        FrozenBackbone().read(rounds[1][:1], rounds[2][:1], told, [3])
    with pytest.raises(SettingError, match="starts >= 1"):
        FrozenBackbone(starts=0)
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match="finds no such device"):
            FrozenBackbone(device="cuda")


def test_rounds_that_train_more_than_a_layer_or_take_more_than_a_step_are_named() -> None:
    shape = (3, 32, 32)
    one = [Assumptions(client_lr=0.1, local_epochs=1)]
    backbone = RoundsSummary(EfficientNetLite0(10, shape), shape, one)
    assert HeadAlone().violation(backbone) is None
    assert FullBatches().violation(backbone) is None
    assert "no bias" in HeadAlone().violation(RoundsSummary(LeNet5(10, shape), shape, one))
    trained = TorchvisionClassifier(10, shape, "resnet18")
    assert "they train features." in HeadAlone().violation(RoundsSummary(trained, shape, one))
    for told, refused in (({}, None), ({"num_clients": 2}, "2 peers"), ({"momentum": 0.9}, "momentum 0.9")):
        several = [Assumptions(client_lr=0.1, local_epochs=3, **told)]
        violation = FullBatches().violation(RoundsSummary(EfficientNetLite0(10, shape), shape, several))
        assert violation is None if refused is None else refused in violation
    adam = RoundsSummary(EfficientNetLite0(10, shape), shape, [Assumptions(0.1, 1, optimizer="Adam")])
    assert "by Adam" in FullBatches().violation(adam)
