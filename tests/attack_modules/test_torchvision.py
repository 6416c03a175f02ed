"""All of torchvision's classifiers through both attacks: finished, or refused in one sentence that names the reason."""

import signal
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision

from attack_modules import FeatureInversion, GradientInversion
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.observed import ObservedRound, RoundsSummary
from fl_lightning.client import LocalTraining
from fl_lightning.errors import AuditError, SettingError
from fl_lightning.federation import Federation
from fl_lightning.models import ImageShape, TorchvisionClassifier
from fl_lightning.observation import describe_model, on_meta

SIZES = (32, 48, 64, 80, 96, 112, 128, 224)
"""Of images; the smallest that a model takes is attacked."""
LARGE = 150_000_000
"""Parameters above which a model is built, tried and checked, but not trained."""
TIME_LIMIT = 240
"""Seconds for the federation and both attacks on a model."""
TOLD = Assumptions(
    0.003, 2, num_clients=2, num_images=2, labels=[0, 1], client_sizes=[1, 1], sources={"labels": "known"}
)
"""Of a round of a model that is not trained."""
FAST = ("shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1")
REASONS = ("not in a linear layer", "requires", "do not fit", "takes at least")


@pytest.fixture
def limited() -> Iterator[None]:
    """Fail instead of hanging, where the system can interrupt."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {TIME_LIMIT} s")

    if hasattr(signal, "SIGALRM"):
        previous = signal.signal(signal.SIGALRM, stop)
        signal.alarm(TIME_LIMIT)
    yield
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def smallest(name: str) -> TorchvisionClassifier:
    """The model for the smallest images on which a peer can train it, on the meta device.

    Raises:
        ValueError: it takes none of `SIZES`.
    """
    for size in SIZES:
        try:
            model = on_meta(lambda size=size: TorchvisionClassifier(10, (3, size, size), name=name))
            model(torch.zeros(1, 3, size, size, device="meta"))  # a peer has one image
            return model
        except (SettingError, ValueError) as error:
            refusal = error
    raise refusal


def outcomes(name: str, observe: Callable, attack: Callable) -> Iterator[str]:
    """`finished` for each attack, or the sentence with which the model, the federation or the attack is refused."""

    def model(num_classes: int, image_shape: ImageShape) -> TorchvisionClassifier:
        return TorchvisionClassifier(num_classes, image_shape, name=name)

    try:
        found = smallest(name)
        large = sum(parameter.numel() for parameter in found.parameters()) > LARGE
        size = found.hparams["image_shape"][1]
        federation = Federation(model=model, client=LocalTraining(local_epochs=2))
        seen: ObservedRound | None = None if large else observe(federation, images_per_client=1, image_size=size)
    except AuditError as error:
        yield str(error)
        return
    for module in (FeatureInversion(), GradientInversion()):
        try:
            if seen is None:
                module.check(RoundsSummary.of_model(describe_model(found), [TOLD]))
                yield "checked"
            else:
                images = attack(module, seen, steps=1).reconstruction().images
                yield "finished" if images.isfinite().all() else "images of NaN or infinity"
        except AuditError as error:
            yield str(error)


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in torchvision.models.list_models(module=torchvision.models)
    ],
)
def test_every_classifier_is_attacked_or_refused(name: str, observe: Callable, attack: Callable, limited: None) -> None:
    for found in outcomes(name, observe, attack):
        print(f"OUTCOME {name}: {found}")
        assert len(found) <= 400
        assert found in ("finished", "checked") or any(reason in found for reason in REASONS), found
