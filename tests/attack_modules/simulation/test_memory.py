"""The forecast of memory: never more than is really held, and not far below it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attack_modules import FeatureInversion, GradientInversion
from attack_modules.attack import Attack
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.memory import simulation_bytes
from attack_modules.threat_model.observed import ObservedRound, RoundsSummary
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.memory import available_memory, exceeds_memory
from fl_lightning.models import ClassifierFactory, LeNet5, ResNet9

Observe = Callable[..., ObservedRound]


def held_bytes(peers: SimulatedPeers, images: Tensor) -> int:
    """Bytes of the distinct storages that the graph of a simulated update keeps, without those of the model."""
    kept: dict[int, int] = {}
    models = {tensor.untyped_storage()._cdata for tensor in peers.parameters.values()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = peers.mean_update(images, torch.arange(4))
    assert graph
    return sum(size for storage, size in kept.items() if storage not in models)


@pytest.mark.parametrize(
    ("model", "epochs", "merged"), [(LeNet5, 1, True), (LeNet5, 3, False), (ResNet9, 2, True), (None, 3, True)]
)
def test_the_forecast_is_below_what_the_graph_holds(
    observe: Observe, batch_norm_classifier: ClassifierFactory, model: ClassifierFactory, epochs: int, merged: bool
) -> None:
    federation = Federation(model=model or batch_norm_classifier, client=LocalTraining(local_epochs=epochs))
    seen = observe(federation, image_size=32)
    summary = RoundsSummary.of([seen])
    forecast = simulation_bytes(summary.model, summary.image_shape, seen.assumptions, merged)
    peers = SimulatedPeers(seen, merged, torch.device("cpu"))
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    assert forecast < held_bytes(peers, images) < 5 * forecast


@pytest.mark.parametrize("attack_class", [FeatureInversion, GradientInversion])
def test_what_exceeds_memory_is_refused_before_work(
    observe: Observe, monkeypatch: pytest.MonkeyPatch, attack_class: type[Attack]
) -> None:
    summary, module = RoundsSummary.of([observe(Federation())]), attack_class()
    needed = module.least_memory(summary)
    for free, fits in ((needed, True), (None, True), (needed - 1, False)):
        monkeypatch.setattr("fl_lightning.memory.available_memory", lambda free=free: free)
        if fits:
            module.check(summary)
            continue
        with pytest.raises(
            RequirementError, match=r"takes at least 0\.0 GB of memory, and 0\.0 GB are free"
        ) as refusal:
            module.check(summary)
        assert len(str(refusal.value)) <= 400
        module.check(summary, device="cuda")
        module.check(summary, processes=2)


def test_chunks_take_less(observe: Observe) -> None:
    summary = RoundsSummary.of([observe(Federation())])
    whole, chunks = (GradientInversion(chunk_size=size).least_memory(summary) for size in (None, 1))
    assert chunks < whole


def test_this_machine_has_memory() -> None:
    assert available_memory() is None or 2**20 < available_memory() < 2**50
    assert exceeds_memory(0) is None
    assert available_memory() is None or exceeds_memory(2**60) is not None
