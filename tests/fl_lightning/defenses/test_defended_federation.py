"""Defences in a federation: who is defended, and what is kept, recorded and told."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import ClientTask, LocalTraining, local_update
from fl_lightning.data import FederatedData, ImageSet
from fl_lightning.defenses import (
    AdaptiveClipping,
    ClientDefense,
    Clipping,
    DPFedAvg,
    GaussianNoise,
    LocalDP,
    ServerDefense,
    Sign,
    TopK,
)
from fl_lightning.engines import InProcess
from fl_lightning.errors import SettingError
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier
from fl_lightning.observation import Observation
from fl_lightning.record import NEW, NEW_OF_CLIENTS, Record, RecordError, fingerprint
from fl_lightning.seats import CuriousServer
from fl_lightning.truth import Truth

Observe = Callable[..., ObservedRound]
Defended = Callable[..., Federation]
ROOT = Path(__file__).parents[3]
NOISE = GaussianNoise(rho=1.0)


@pytest.fixture
def defended(linear_classifier: type[ImageClassifier]) -> Defended:
    """A federation with defences of the clients and of the server."""

    def federation(*client: ClientDefense, server: list[ServerDefense] | None = None, **settings: object) -> Federation:
        training = LocalTraining(lr=0.1, local_epochs=1, defenses=list(client))
        return Federation(linear_classifier, training, server_defenses=server, **settings)

    return federation


def test_the_observing_clients_own_update_is_defended_too(
    defended: Defended, observe: Observe, relative_error: Callable
) -> None:
    seen = observe(defended(TopK(keep=0.1)))
    for tensor in seen.observation.own_update.values():
        assert 0 < (tensor != 0).sum() <= max(1, int(0.1 * tensor.numel()))
    alone = observe(defended(TopK(keep=0.1)), attacker_images=0)
    assert relative_error(seen.peers_update(), alone.peers_update()) < 1e-4


def test_what_the_server_clips_on_arrival_is_what_the_observer_subtracts(defended: Defended, observe: Observe) -> None:
    seen = observe(defended(server=[Clipping(norm=1e-3)])).observation
    assert torch.stack([tensor.norm() for tensor in seen.own_update.values()]).norm().item() == pytest.approx(1e-3)


def test_the_server_changes_the_mean(defended: Defended, observe: Observe, relative_error: Callable) -> None:
    plain, noisy = (observe(defended(server=server), num_clients=2) for server in (None, [NOISE]))
    assert relative_error(noisy.aggregated_update(), plain.aggregated_update()) == pytest.approx(1, rel=0.05)
    assert relative_error(noisy.observation.own_update, plain.observation.own_update) == 0


def test_defences_are_applied_in_their_order(linear_classifier: type[ImageClassifier]) -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    task = ClientTask(linear_classifier(4, (3, 8, 8)), ImageSet(pixels, torch.arange(4)), seed=0)
    orders = [TopK(keep=0.1), Sign()], [Sign(), TopK(keep=0.1)]
    updates = [local_update(task, LocalTraining(defenses=order)).update for order in orders]
    few_signs, few_of_signs = (update["head.0.weight"] for update in updates)
    assert few_signs.abs().max() < 0.9 * few_of_signs.abs().max()  # the mean size of few entries, and of all


def test_resumed_equals_uninterrupted_with_memory_and_noise(
    defended: Defended, tmp_path: Path, noise_images: type[FederatedData]
) -> None:
    class Interrupted(InProcess):
        def train(self, *arguments: object) -> Iterator:
            if Record(tmp_path / "parts").checkpoint.exists():
                raise SystemExit(1)
            return super().train(*arguments)

    def federation(**settings: object) -> Federation:
        feedback = TopK(keep=0.2, error_feedback=True)
        return defended(feedback, NOISE, server=[NOISE], rounds=2, **settings)

    data = noise_images(num_clients=2, images_per_client=2, image_size=16)
    federation().run(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federation(engine=Interrupted()).run(data, tmp_path / "parts")
    federation().run(data, tmp_path / "parts")
    whole, parts = (Observation.load(Record(tmp_path / name).observation(1)) for name in ("whole", "parts"))
    for group in ("before", "after", "own_update"):
        assert all(torch.equal(tensor, getattr(parts, group)[name]) for name, tensor in getattr(whole, group).items())


def test_records_of_other_defences_are_refused(
    defended: Defended, tmp_path: Path, noise_images: type[FederatedData]
) -> None:
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    federations = [defended(), defended(TopK()), defended(TopK(keep=0.2)), defended(server=[NOISE])]
    settings = [federation.settings(data) for federation in federations]
    older = {name: value for name, value in settings[0].items() if name not in NEW}
    older["client"] = {name: value for name, value in older["client"].items() if name not in NEW_OF_CLIENTS}
    older["data"] = {name: value for name, value in older["data"].items() if name != "channels"}
    assert fingerprint(older) == fingerprint(settings[0])
    assert len({fingerprint(each) for each in settings}) == 4
    settings.append(older)
    for number, held in enumerate(settings):
        record = Record(tmp_path / str(number))
        record.claim(held)
        for other in settings:
            if fingerprint(other) == fingerprint(held):
                record.claim(other)
            else:
                with pytest.raises(RecordError, match="defenses was"):
                    record.claim(other)


def test_the_attacker_is_told_of_defences_or_not(
    defended: Defended, tmp_path: Path, noise_images: type[FederatedData]
) -> None:
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    data.setup()
    defended(TopK(), server=[NOISE]).truth(0, data).save(tmp_path / "truth")
    truth = Truth.load(tmp_path / "truth")
    told = Knowledge().assumptions(truth)
    assert (told.defenses, told.server_defenses) == ((TopK(),), (NOISE,))
    assert told.sources["defenses"] == "known"
    blind = Knowledge(defenses="unknown").assumptions(truth)
    assert (blind.defenses, blind.server_defenses, blind.sources["defenses"]) == ((), (), "unknown")
    guess = Knowledge(defenses=[Sign()]).assumptions(truth)
    assert (guess.defenses, guess.server_defenses, guess.sources["defenses"]) == ((Sign(),), (), "guessed")
    without = {"labels": "inferred", "label_counts": "inferred", "num_images": "inferred", "num_clients": "inferred"}
    foreign = Knowledge(**without, client_lr=0.1, server_lr=1.0, local_epochs=1, batch_size=None)
    assert foreign.assumptions(None).sources["defenses"] == "guessed"  # none


def test_guarantees_that_other_settings_break_are_refused(
    batch_norm_classifier: type[ImageClassifier], noise_images: type[FederatedData]
) -> None:
    def refused(sentence: str, **settings: object) -> None:
        with pytest.raises(SettingError, match=sentence) as error:
            Federation(batch_norm_classifier, **settings).settings(data)
        assert len(str(error.value)) <= 400

    data = noise_images(num_clients=2, images_per_client=2, image_size=16)
    private = DPFedAvg()
    refused("DPFedAvg guarantees nothing with TopK", server_defenses=[TopK(), private])
    refused("DPFedAvg guarantees nothing with AdaptiveClipping", server_defenses=[private, AdaptiveClipping()])
    refused("LocalDP guarantees nothing beside BatchNorm", client=LocalTraining(defenses=[LocalDP()]))
    refused("hide nothing from it", server_defenses=[NOISE], seat=CuriousServer(secure_aggregation=True))
    layers = ["features.0", "head"]
    for fit in ({"share_buffers": False}, {"trainable": layers}):
        Federation(batch_norm_classifier, server_defenses=[Clipping(), private, TopK()], **fit).settings(data)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/defenses").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_run(path: Path, tmp_path: Path, noise_images: type[FederatedData]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Federation, "federation")
    federation = parser.instantiate_classes(parser.parse_string(path.read_text())).federation
    data = noise_images(num_clients=2, images_per_client=[2, 0], image_size=8)
    federation.client = replace(federation.client, local_epochs=1)
    federation.run(data, tmp_path)
    seen, truth = Observation.load(Record(tmp_path).observation(0)), Truth.load(Record(tmp_path).truth(0))
    assert not all(torch.equal(tensor, seen.after[name]) for name, tensor in seen.before.items())
    assert truth.training == federation.client
    assert truth.training.defenses or truth.server_defenses or truth.training.optimizer == "Adam"
