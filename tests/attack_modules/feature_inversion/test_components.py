"""Components of feature inversion combined, and the former names of each alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attack_modules import (
    AttributedInversion,
    ChangingParticipants,
    DiffusionGuidance,
    FeatureInversion,
    GuidedInversion,
    RefinedInversion,
    Refinement,
)
from attack_modules.attack import Attack
from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound, ObservedRounds
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.record import Record
from fl_lightning.truth import Truth

Run = Callable[..., Attack]
BLIND = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred", num_clients="inferred")


class Shrinking(Denoiser):
    """Draws pixels towards grey."""

    sigma_min, sigma_max, multiple = 1e-4, 10.0, 1

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 + (noisy - 0.5) / (1 + sigma.view(-1, 1, 1, 1))


@pytest.fixture
def watched(tmp_path: Path, noise_images: type) -> tuple[list[ObservedRound], Truth]:
    """Three rounds, each of three of four clients, whose training changes the model much."""
    data = noise_images(num_clients=4, images_per_client=2, image_size=16, num_classes=50)
    federation = Federation(
        client=LocalTraining(lr=0.02, local_epochs=3),
        rounds=3,
        clients_per_round=3,
        broadcast="all",
        observed_rounds=[0, 1, 2],
    )
    rounds = ObservedRounds(BLIND, federation, data, tmp_path)
    rounds.prepare_data()
    rounds.setup()
    return rounds.rounds, Truth.union([Truth.load(Record(tmp_path).truth(round_)) for round_ in range(3)])


def test_refined_and_guided_over_several_rounds(watched: tuple[list[ObservedRound], Truth], attack: Run) -> None:
    rounds, truth = watched

    def run(**parts: object) -> FeatureInversion:
        return attack(FeatureInversion(lr=0.1, rounds=ChangingParticipants(), **parts), *rounds, steps=12)

    guidance = DiffusionGuidance(Shrinking(), weight=0.01, denoise_every=5)
    everything, refined = run(refinement=Refinement(), guidance=guidance), run(refinement=Refinement())
    assert everything.title == "FeatureInversion + Refinement + DiffusionGuidance + ChangingParticipants"
    introduced = everything.introduction()
    assert all(word in introduced for word in ("Refinement:", "Guidance:", "Rounds:"))
    assert len(everything.labels) == len(truth.labels) == 6
    assert guidance.sigmas.isfinite().all()
    assert not torch.equal(everything.images, refined.images)

    # Over all rounds together, the originals are a fixed point of refinement, unlike of the features as they leaked.
    nearest = torch.cdist(everything.leakage.features, everything.model.embed(truth.images)).argmin(1)
    originals = truth.images[nearest]
    target = everything.model.embed(originals)
    everything.best.copy_(originals)
    everything._simulate_drift()
    errors = (everything.features - target).norm(dim=1) / target.norm(dim=1)
    assert errors.max() < 1e-3
    assert ((everything.leakage.features - target).norm(dim=1) / target.norm(dim=1)).min() > 5e-3


@pytest.mark.parametrize(
    ("former", "part", "buffers"),
    [
        (RefinedInversion, {"refinement": Refinement}, {"sought", "trusted", "lacking", "ended"}),
        (lambda: GuidedInversion(Shrinking()), {"guidance": lambda: DiffusionGuidance(Shrinking())},
         {"denoised", "sigmas", "errors"}),
        (AttributedInversion, {"rounds": ChangingParticipants}, set()),
    ],
)  # fmt: skip
def test_former_names_do_the_same_and_read_their_checkpoints(
    observe: Callable[..., ObservedRound], attack: Run, former: Callable, part: dict, buffers: set[str]
) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.02)), BLIND, num_classes=50)
    old = attack(former(), seen, steps=4)
    new = attack(FeatureInversion(**{name: make() for name, make in part.items()}), seen, steps=4)
    assert torch.equal(old.images, new.images)
    assert old.resimulations == new.resimulations
    state = {name.rpartition(".")[2] if "." in name else name: tensor for name, tensor in old.state_dict().items()}
    today = {"target_features": "sought", "best_features": "trusted", "best_residual": "lacking", "stopped": "ended"}
    checkpoint = {"state_dict": {today.get(name, name): tensor for name, tensor in state.items()}}
    assert buffers <= checkpoint["state_dict"].keys()
    checkpoint["observed"] = {"attack": old.title, "rounds": old._fingerprint()["rounds"]}
    assert old.title == type(old).__name__
    old.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == old.state_dict().keys()
