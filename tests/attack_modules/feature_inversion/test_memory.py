"""The forecast of memory, against peaks that were measured (tests/benchmarks/README.md)."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from attack_modules import FeatureInversion
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.observed import RoundsSummary
from fl_lightning import memory
from fl_lightning.allocation import release_pages
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.memory import LATER, forecast
from fl_lightning.models import ClassifierFactory, LeNet5, TorchvisionClassifier
from fl_lightning.models.activations import activation_bytes
from fl_lightning.observation import describe_model, on_meta

PROGRAM = 640
"""MiB of the program before the work."""
LIBRARIES = 210
"""MiB that it had more where these were measured: libraries' code, which is given back now."""


@pytest.mark.parametrize(
    ("model", "size", "clients", "each", "measured"),
    [
        (LeNet5, 128, 5, 16, 1380),
        (partial(TorchvisionClassifier, name="alexnet"), 64, 3, 2, 2050 - LIBRARIES),
        (partial(TorchvisionClassifier, name="vgg11"), 32, 3, 8, 3377 - LIBRARIES),
        (partial(TorchvisionClassifier, name="resnet18"), 64, 3, 2, 1456 - LIBRARIES),
    ],
)
def test_the_forecast_is_near_what_was_measured(
    model: ClassifierFactory, size: int, clients: int, each: int, measured: int
) -> None:
    shape, training = (3, size, size), LocalTraining()
    data = SimpleNamespace(num_classes=1000, image_shape=shape, clients=[range(each)] * clients)
    description = describe_model(on_meta(lambda: model(1000, shape)))
    rounds = RoundsSummary.of_model(description, [Assumptions(training.lr, training.local_epochs)])
    federation = Federation(model=model, client=training).peak_memory(data)
    peak = max(federation, FeatureInversion().peak_memory(rounds, clients * each)) + LATER
    assert (peak >> 20) + PROGRAM == pytest.approx(measured, rel=0.25)


def test_the_forecast_counts_what_settings_add() -> None:
    """Of small models too, of which the program takes most."""
    shape, training = (3, 64, 64), LocalTraining()
    model = on_meta(lambda: LeNet5(100, shape))
    rounds = RoundsSummary.of_model(describe_model(model), [Assumptions(training.lr, training.local_epochs)])
    few, many = (FeatureInversion(chunk_size=size).peak_memory(rounds, 100) for size in (48, 80))
    assert many - few == 2 * (80 - 48) * activation_bytes(model, shape)
    data = SimpleNamespace(num_classes=100, image_shape=shape, clients=[range(4)] * 3)
    trained = sum(parameter.nbytes for parameter in model.parameters())
    clients = training, LocalTraining(momentum=0.9), LocalTraining(optimizer="Adam")
    sgd, momentum, adam = (Federation(model=LeNet5, client=client).peak_memory(data) for client in clients)
    assert momentum - sgd == adam - momentum == trained


@pytest.mark.parametrize("free", [None, 10**9, 10**12])
def test_the_forecast_says_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    monkeypatch.setattr(memory, "resident_memory", lambda: 8 * 10**8)
    line = forecast(2 * 10**9 - LATER)
    assert line.startswith("Memory, by forecast: 2.8 GB at most, 0.8 GB now")
    assert ("more than the 1.0 GB that are free" in line) == (free == 10**9)


def test_pages_that_are_given_back_are_read_again() -> None:
    tensor, small = torch.arange(2**20), torch.ones(3)
    release_pages([tensor, small])
    assert torch.equal(tensor, torch.arange(2**20))
    assert small.sum() == 3
