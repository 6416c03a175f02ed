from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from attack_modules import ChangingParticipants, FeatureInversion
from attack_modules.attack import Attack, AttackError
from attack_modules.feature_inversion import rounds as rounds_module
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound, ObservedRounds
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.record import Record
from fl_lightning.truth import Truth

Run = Callable[..., Attack]
BLIND = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred", num_clients="inferred")


@pytest.fixture(params=[1, 2])
def watched(request: pytest.FixtureRequest, tmp_path: Path, noise_images: type) -> tuple[list[ObservedRound], Truth]:
    """Five rounds, each of three of five clients, and the truth of all of them."""
    data = noise_images(num_clients=5, images_per_client=2, image_size=16, num_classes=50)
    training = LocalTraining(lr=0.02, local_epochs=request.param)
    federation = Federation(
        client=training, rounds=5, clients_per_round=3, broadcast="all", observed_rounds=[*range(5)]
    )
    observed = ObservedRounds(BLIND, federation, data, tmp_path)
    observed.prepare_data()
    observed.setup()
    record = Record(tmp_path)
    return observed.rounds, Truth.union([Truth.load(record.truth(round_)) for round_ in range(5)])


def test_images_are_recognised_and_grouped_by_client(watched: tuple[list[ObservedRound], Truth], attack: Run) -> None:
    seen, truth = watched
    module = attack(FeatureInversion(lr=0.1, prior_limit=(0.3, 0.001), rounds=ChangingParticipants()), *seen, steps=60)
    assert len(module.labels) == len(truth.labels) == 8
    target = module.model.embed(truth.images)
    distances = torch.cdist(module.features, target) / target.norm(dim=1)
    nearest = distances.argmin(1)
    assert sorted(nearest.tolist()) == list(range(8))
    assert distances.amin(1).max() < 0.05
    assert module.labels.tolist() == truth.labels[nearest].tolist()
    assert adjusted_rand_score(truth.clients[nearest].tolist(), module.reconstruction().peers.tolist()) == 1
    shown = [int(len(observed.observation.own_update) == 0) for observed in seen]
    assert [int(count) for count in module.presence.sum(1)] == [4 + 2 * absent for absent in shown]
    printed = module.introduction()
    assert "8 different ones" in printed
    assert "of 4 peers" in printed


def test_feature_inversion_points_here(watched: tuple[list[ObservedRound], Truth], attack: Run) -> None:
    with pytest.raises(AttackError, match="rounds: ChangingParticipants"):
        attack(FeatureInversion(), *watched[0], steps=1)


def test_a_round_that_cannot_be_read_is_named(
    watched: tuple[list[ObservedRound], Truth], attack: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = watched
    module = attack(FeatureInversion(rounds=ChangingParticipants()), *seen[:2], steps=1)
    bad = replace(module.leakage, diagnosis=replace(module.leakage.diagnosis, residual=0.97))
    monkeypatch.setattr(rounds_module, "leak_known", lambda updates, weights, beliefs: bad)
    with pytest.warns(
        UserWarning, match=r"Round 1 could not be read: 97% of its update is unexplained.*`federation.observed_rounds`"
    ):
        attack(FeatureInversion(rounds=ChangingParticipants()), seen[1], steps=1)
