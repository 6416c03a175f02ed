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
from fl_lightning.observation import describe_model, on_meta

PROGRAM = 850
"""MiB of the program before the work."""


@pytest.mark.parametrize(
    ("model", "size", "clients", "each", "measured"),
    [
        (LeNet5, 128, 5, 16, 1902),
        (partial(TorchvisionClassifier, name="alexnet"), 64, 3, 2, 2734),
        (partial(TorchvisionClassifier, name="vgg11"), 32, 3, 8, 3761),
        (partial(TorchvisionClassifier, name="resnet18"), 64, 3, 2, 1456),
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
