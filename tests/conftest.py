"""Small federations that every test can afford: smooth random images of 16x16 and models to match."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from attack_modules.analytic.typical_head import pink_noise
from attack_modules.attack import Attack
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import GivenRounds, ObservedRound, ObservedRounds
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.data import Catalogue, FederatedData
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier, ImageShape

keep_freed_memory()


class NoiseImages(FederatedData):
    """Pink noise, as many images as the clients need, image i of class i modulo 10."""

    def catalogue(self) -> Catalogue:
        pixels = (pink_noise(64, self.image_shape, seed=7) * 255).round().byte()
        return Catalogue(torch.arange(64) % 10, [f"class {i}" for i in range(10)], lambda index: pixels[index])


class LinearClassifier(ImageClassifier):
    """Softmax regression on pixels."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.0,), (1.0,))
        self.save_hyperparameters()
        self.features = nn.Flatten()
        self.head = nn.Sequential(nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], num_classes))


class BatchNormClassifier(ImageClassifier):
    """One convolution, BatchNorm, ReLU and a linear head."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.5,), (0.25,))
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(image_shape[0], 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(8 * image_shape[1] * image_shape[2] // 4, num_classes))


@pytest.fixture
def observe(tmp_path: Path) -> Callable[..., ObservedRound]:
    """Run a federation on noise images and return its last observed round."""

    def run(federation: Federation, knowledge: Knowledge | None = None, **data: object) -> ObservedRound:
        directory = tmp_path / f"record_{len(list(tmp_path.iterdir()))}"
        images = NoiseImages(**{"num_clients": 3, "images_per_client": 2, "image_size": 16, **data})
        rounds = ObservedRounds(knowledge or Knowledge(), federation, images, directory)
        rounds.prepare_data()
        rounds.setup()
        return rounds.rounds[-1]

    return run


@pytest.fixture
def noise_images() -> type[NoiseImages]:
    return NoiseImages


@pytest.fixture
def linear_classifier() -> type[LinearClassifier]:
    return LinearClassifier


@pytest.fixture
def batch_norm_classifier() -> type[BatchNormClassifier]:
    return BatchNormClassifier


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected| over all tensors."""
    error = sum((found[name] - tensor).square().sum() for name, tensor in expected.items())
    return float((error / sum(tensor.square().sum() for tensor in expected.values())).sqrt())


@pytest.fixture(name="relative_error")
def relative_error_fixture() -> Callable[[dict[str, Tensor], dict[str, Tensor]], float]:
    return relative_error


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attack]:
    """Run an attack on observed rounds for some steps, without leaving files, and return it."""
    monkeypatch.setattr(Attack, "configure_callbacks", lambda self: [])

    def run(module: Attack, *rounds: ObservedRound, steps: int, accelerator: str = "cpu", **trainer: object) -> Attack:
        Trainer(
            max_steps=steps,
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **trainer,
        ).fit(module, datamodule=GivenRounds(rounds))
        return module

    return run
