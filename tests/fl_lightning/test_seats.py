"""What each seat sees of the same round, and that nothing else crosses the wire."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attack_modules import FeatureInversion, GradientInversion
from attack_modules.attack import Attack
from attack_modules.feature_inversion.rounds import ChangingParticipants
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound, ObservedRounds
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import LocalTraining
from fl_lightning.data import FederatedData
from fl_lightning.errors import SettingError
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier
from fl_lightning.record import Record
from fl_lightning.seats import ColludingClients, CuriousClient, CuriousServer, Seat
from fl_lightning.server_optimizers import FedAdam, FedAvg
from fl_lightning.truth import Truth

STEEP = LocalTraining(0.02, 1)
SIZES = {"num_clients": 4, "images_per_client": [1, 2, 1, 3]}


@pytest.fixture
def seen(
    noise_images: type[FederatedData], linear_classifier: type[ImageClassifier], tmp_path: Path
) -> Callable[..., list[ObservedRound]]:
    def look(seat: Seat | None, knowledge: Knowledge | None = None, **settings: object) -> list[ObservedRound]:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        federation = Federation(linear_classifier, STEEP, seat=seat, **settings)
        rounds = ObservedRounds(knowledge or Knowledge(), federation, noise_images(image_size=16, **SIZES), directory)
        rounds.summary()
        rounds.prepare_data()
        rounds.setup()
        truths = [Truth.load(rounds.record.truth(r.observation.round, r.client)) for r in rounds.rounds]
        assert [t.labels.tolist() for t in truths] == [r.assumptions.labels for r in rounds.rounds]
        return rounds.rounds

    return look


def mean(updates: list[dict[str, Tensor]], weights: list[int]) -> dict[str, Tensor]:
    return {n: sum(w * u[n] for w, u in zip(weights, updates, strict=True)) / sum(weights) for n in updates[0]}


def test_all_seats_tell_of_the_same_updates(seen: Callable, relative_error: Callable) -> None:
    views = seen(CuriousServer())
    assert [view.client for view in views] == [0, 1, 2, 3]
    assert [view.assumptions.client_sizes for view in views] == [[1], [2], [1], [3]]
    updates = [view.peers_update() for view in views]
    (own,), (collusion,), (secure,) = seen(None), seen(ColludingClients(2)), seen(CuriousServer(True))
    assert own.observation.own_weight == pytest.approx(3 / 7)
    assert collusion.observation.own_weight == pytest.approx(4 / 7)
    assert (secure.observation.own_weight, secure.observation.own_update) == (0.0, {})
    assert relative_error(own.peers_update(), mean(updates[:3], [1, 2, 1])) < 1e-3
    assert relative_error(collusion.peers_update(), mean(updates[:2], [1, 2])) < 1e-3
    assert relative_error(secure.peers_update(), mean(updates, [1, 2, 1, 3])) < 1e-3
    assert relative_error(own.peers_update(), secure.peers_update()) > 0.1


def test_a_server_is_not_fooled_by_its_own_optimizer(seen: Callable, relative_error: Callable) -> None:
    plain, adaptive = (seen(CuriousServer(), Knowledge(server=s), server=s) for s in (FedAvg(), FedAdam()))
    assert relative_error(adaptive[1].peers_update(), plain[1].peers_update()) == 0


def test_a_server_reads_each_clients_images(seen: Callable, attack: Callable[..., Attack]) -> None:
    views = seen(CuriousServer())
    found = attack(FeatureInversion(rounds=ChangingParticipants()), *views, steps=1).reconstruction()
    truth = [label for view in views for label in view.assumptions.labels]
    assert sorted(found.labels.tolist()) == sorted(truth)
    assert found.peers.bincount().sort().values.tolist() == [1, 1, 2, 3]
    for refused in (FeatureInversion(), GradientInversion()):
        with pytest.raises(RequirementError, match=r"sees 4 clients, each by itself.*secure_aggregation"):
            attack(refused, *views, steps=1)


def test_rounds_that_reach_no_colluder_are_not_observed_and_the_server_sees_all(noise_images: type) -> None:
    data = noise_images(image_size=16, num_clients=6, images_per_client=1)
    data.setup()

    def reached(seat: Seat) -> list[int]:
        takes_part = Federation(rounds=12, clients_per_round=2, seat=seat).participation(data)
        return [r for r in range(12) if takes_part.is_received(r)]

    one, three = reached(CuriousClient()), reached(ColludingClients(3))
    assert 0 < len(one) < len(three) <= 12
    assert set(one) <= set(three)
    assert reached(CuriousServer()) == list(range(12))
    with pytest.raises(SettingError, match="All 6 clients collude"):
        Federation(seat=ColludingClients(6)).settings(data)
    with pytest.raises(SettingError, match="at least one client"):
        ColludingClients(0)


def test_lost_views_come_back(
    noise_images: type[FederatedData], linear_classifier: type[ImageClassifier], tmp_path: Path
) -> None:
    data = noise_images(image_size=16, num_clients=2, images_per_client=1)
    federation = Federation(linear_classifier, STEEP, seat=CuriousServer(), trainable=["head.0.weight"])
    federation.run(data, tmp_path)
    kept = {path: path.read_bytes() for folder in ("observed", "truth") for path in (tmp_path / folder).iterdir()}
    assert len(kept) == 8
    assert Record(tmp_path).observed_rounds == [0]
    (tmp_path / "observed/round_0000_client_0001.json").unlink()
    federation.run(data, tmp_path)
    assert {path: path.read_bytes() for path in kept} == kept
    assert torch.is_tensor(Truth.load(Record(tmp_path).truth(0, 1)).pixels)
