"""Attacks on another device than the CPU: what each needs where, and on a GPU the same images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torchvision.models import VisionTransformer

from attack_modules import (
    BatchStatistics,
    ChromaTotalVariation,
    Convolutions,
    DiffusionGuidance,
    FeatureInversion,
    GradientInversion,
    PatchInversion,
    Refinement,
)
from attack_modules.attack import Attack
from attack_modules.enhance.direct.enhancer import PRIOR
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import LocalTraining
from fl_lightning.defenses import DPSGD, FedProx, GaussianNoise, LocalDP, Mixup, Sign, Soteria, TopK
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier, ImageShape, WrappedClassifier

TRAINING = LocalTraining(lr=0.003, local_epochs=3)
FEW = {"num_clients": 2, "images_per_client": [1, 3]}
MANY = {"num_clients": 3, "images_per_client": 2, "num_classes": 50}
VIT = {"image_size": 16, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 48}


class Normalised(ImageClassifier):
    """Two convolutions with BatchNorm, of which the second is wide."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.5,), (0.25,))
        self.save_hyperparameters()
        first, second = nn.Conv2d(image_shape[0], 16, 5, 2, 2), nn.Conv2d(16, 96, 3, 2, 1)
        layers = first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.BatchNorm2d(96), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(nn.Linear(96, num_classes))


def once(**settings: object) -> Federation:
    """One local step."""
    return Federation(client=LocalTraining(lr=0.1, local_epochs=1, **settings))


@dataclass(frozen=True)
class Case:
    """An attack, and what it is made on."""

    attack: Callable[[], Attack]
    federation: Callable[[], Federation] = lambda: Federation(client=TRAINING)
    data: dict[str, object] = field(default_factory=dict)


CASES = {
    "features": Case(FeatureInversion),
    "refined": Case(lambda: FeatureInversion(refinement=Refinement(2))),
    "guided": Case(lambda: FeatureInversion(guidance=DiffusionGuidance(PRIOR, denoise_every=2))),
    "head": Case(lambda: GradientInversion(merged=False, simulate="head", priors=[ChromaTotalVariation(1.0)])),
    "latent": Case(lambda: GradientInversion(latent_downscale=2, detail=True, chunk_size=2)),
    "maps": Case(
        lambda: FeatureInversion(convolutions=Convolutions(), statistics=BatchStatistics()),
        lambda: Federation(model=Normalised, client=LocalTraining(lr=0.1, local_epochs=1)),
        FEW,
    ),
    "patches": Case(
        PatchInversion,
        lambda: Federation(
            model=partial(WrappedClassifier, module=VisionTransformer, arguments={**VIT, "num_classes": 10}),
            client=LocalTraining(lr=0.1, local_epochs=2),
        ),
        FEW,
    ),
    "noise": Case(FeatureInversion, lambda: once(defenses=[GaussianNoise(rho=0.3)]), MANY),
    "top-k": Case(FeatureInversion, lambda: once(defenses=[TopK(0.3)]), MANY),
    "signs": Case(FeatureInversion, lambda: once(defenses=[Sign()]), MANY),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class NewTensorsElsewhere(SingleDeviceStrategy):
    """Trains on the CPU, but new tensors would lie elsewhere while the model is made, as they do with a GPU."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with torch.device("meta"):
            yield


@every_case
def test_an_attack_is_prepared_on_the_cpu(
    case: Case, observe: Callable[..., ObservedRound], attack: Callable[..., Attack]
) -> None:
    seen = observe(case.federation(), **case.data)
    expected, found = (
        attack(case.attack(), seen, steps=3, precision="64-true", **where).reconstruction().images
        for where in ({}, {"strategy": NewTensorsElsewhere("cpu")})
    )
    assert torch.equal(found, expected)


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.gpu
@every_case
def test_an_attack_gives_the_same_on_a_gpu(
    case: Case, observe: Callable[..., ObservedRound], attack: Callable[..., Attack]
) -> None:
    """In float64: Adam's first steps amplify what float32 rounds."""
    needs_cuda()
    seen = observe(case.federation(), **case.data)
    expected, found = (
        attack(case.attack(), seen, steps=3, precision="64-true", accelerator=name).reconstruction().images.cpu()
        for name in ("cpu", "gpu")
    )
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.gpu
@every_case
def test_python_gives_the_same_on_a_gpu(case: Case, observe: Callable[..., ObservedRound]) -> None:
    needs_cuda()
    seen = observe(case.federation(), **case.data)
    expected, found = (
        case.attack().reconstruct(seen.observation, seen.assumptions, 20, accelerator) for accelerator in ("cpu", "gpu")
    )
    assert torch.equal(found.labels, expected.labels)
    assert (found.images - expected.images).square().mean().sqrt() < 0.1
    assert found.misfit.device.type == found.images.device.type == "cpu"
    assert torch.allclose(found.misfit, expected.misfit, rtol=0.5, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "defense",
    [None, TopK(0.1), LocalDP(1.0, 1e-3), DPSGD(), Mixup(0.4), Soteria(10.0), FedProx(1.0)],
    ids=lambda defense: type(defense).__name__,
)
def test_clients_train_the_same_on_a_gpu(defense: object, observe: Callable[..., ObservedRound]) -> None:
    needs_cuda()
    training = LocalTraining(lr=0.003, local_epochs=3, defenses=[defense] if defense else [])
    cpu, gpu = (observe(Federation(client=training, accelerator=name)).observation for name in ("cpu", "gpu"))
    moved = sum((cpu.after[name] - before).square().sum() for name, before in cpu.before.items()).sqrt()
    apart = sum((cpu.after[name] - gpu.after[name]).square().sum() for name in cpu.after).sqrt()
    # DP-SGD's noise is drawn on the device; top-k keeps other entries where two are nearly equal
    limit = {DPSGD: 2.0, TopK: 0.1}.get(type(defense), 0.02)
    assert apart < limit * moved
