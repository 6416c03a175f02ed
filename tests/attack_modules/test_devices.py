"""Attacks on another device than the CPU: what each needs where, and on a GPU the same images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from attack_modules import ChromaTotalVariation, DiffusionGuidance, FeatureInversion, GradientInversion, Refinement
from attack_modules.attack import Attack
from attack_modules.enhance.direct.enhancer import PRIOR
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import LocalTraining
from fl_lightning.defenses import DPSGD, FedProx, LocalDP, Mixup, Soteria, TopK
from fl_lightning.federation import Federation

ATTACKS = [
    FeatureInversion,
    lambda: FeatureInversion(refinement=Refinement(2)),
    lambda: FeatureInversion(guidance=DiffusionGuidance(PRIOR, denoise_every=2)),
    lambda: GradientInversion(merged=False, simulate="head", priors=[ChromaTotalVariation(1.0)]),
    lambda: GradientInversion(latent_downscale=2, detail=True, chunk_size=2),
]
NAMES = ["features", "refined", "guided", "head", "latent"]
TRAINING = LocalTraining(lr=0.003, local_epochs=3)


class NewTensorsElsewhere(SingleDeviceStrategy):
    """Trains on the CPU, but new tensors would lie elsewhere while the model is made, as they do with a GPU."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with torch.device("meta"):
            yield


@pytest.mark.parametrize("make", ATTACKS, ids=NAMES)
def test_an_attack_is_prepared_on_the_cpu(
    make: Callable[[], Attack], observe: Callable[..., ObservedRound], attack: Callable[..., Attack]
) -> None:
    seen = observe(Federation(client=TRAINING))
    expected, found = (
        attack(make(), seen, steps=3, precision="64-true", **where).reconstruction().images
        for where in ({}, {"strategy": NewTensorsElsewhere("cpu")})
    )
    assert torch.equal(found, expected)


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("make", ATTACKS, ids=NAMES)
def test_an_attack_gives_the_same_on_a_gpu(
    make: Callable[[], Attack], observe: Callable[..., ObservedRound], attack: Callable[..., Attack]
) -> None:
    """In float64: Adam's first steps amplify what float32 rounds."""
    needs_cuda()
    seen = observe(Federation(client=TRAINING))
    expected, found = (
        attack(make(), seen, steps=3, precision="64-true", accelerator=name).reconstruction().images.cpu()
        for name in ("cpu", "gpu")
    )
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("make", ATTACKS, ids=NAMES)
def test_python_gives_the_same_on_a_gpu(make: Callable[[], Attack], observe: Callable[..., ObservedRound]) -> None:
    needs_cuda()
    seen = observe(Federation(client=TRAINING))
    expected, found = (
        make().reconstruct(seen.observation, seen.assumptions, 20, accelerator) for accelerator in ("cpu", "gpu")
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
