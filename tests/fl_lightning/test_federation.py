import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import ClientTask, ClientUpdate, LocalTraining
from fl_lightning.data import FederatedData, ImageFolder, Photographs
from fl_lightning.engines import InProcess
from fl_lightning.errors import SettingError
from fl_lightning.federation import Federation, Kept
from fl_lightning.models import ImageClassifier, ImageShape, LeNet5
from fl_lightning.observation import Observation
from fl_lightning.record import Record, RecordError, fingerprint
from fl_lightning.seats import CuriousServer
from fl_lightning.storage import StorageError, load_checkpoint
from fl_lightning.truth import Truth

Observe = Callable[..., ObservedRound]
STEEP = LocalTraining(lr=0.1, local_epochs=2)


def test_subtracting_the_own_update_leaves_the_victims_alone(observe: Observe, relative_error: Callable) -> None:
    """Issue: five clients less the attacker's own update give the same target as four victims alone."""
    five = observe(Federation(client=STEEP), num_clients=5)
    four = observe(Federation(client=STEEP), num_clients=5, attacker_images=0)
    assert five.observation.own_weight == pytest.approx(1 / 5)
    assert four.observation.own_weight == 0
    assert relative_error(five.peers_update(), four.peers_update()) < 1e-4
    assert relative_error(five.aggregated_update(), four.peers_update()) > 0.05


def test_with_two_clients_the_peers_update_is_the_one_peers_own(observe: Observe, relative_error: Callable) -> None:
    sizes = {"num_clients": 2, "images_per_client": [3, 5]}
    seen = observe(Federation(client=STEEP), **sizes).peers_update()
    alone = observe(Federation(client=STEEP), num_clients=2, images_per_client=[3, 0])
    assert relative_error(seen, alone.aggregated_update()) < 1e-4


def test_server_lr_is_undone(observe: Observe, relative_error: Callable) -> None:
    slow = observe(Federation(client=STEEP, server_lr=0.25))
    assert relative_error(slow.peers_update(), observe(Federation(client=STEEP)).peers_update()) < 1e-4


def _run(directory: Path) -> None:
    data = Photographs(num_clients=4, images_per_client=2, image_size=16)
    data.setup()
    training = LocalTraining(lr=0.1, local_epochs=2, batch_size=1)
    federation = Federation(client=training, rounds=4, clients_per_round=2, broadcast="all", observed_rounds=[1, 3])
    federation.run(data, directory)


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from fl_lightning import federation as module
from fl_lightning.client import LocalTraining
from fl_lightning.data import Photographs

save = module.save_checkpoint
def save_and_die(path, content):
    save(path, content)
    if content["rounds_done"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
module.save_checkpoint = save_and_die

data = Photographs(num_clients=4, images_per_client=2, image_size=16)
data.setup()
training = LocalTraining(lr=0.1, local_epochs=2, batch_size=1)
federation = module.Federation(
    client=training, rounds=4, clients_per_round=2, broadcast="all", observed_rounds=[1, 3]
)
federation.run(data, Path(sys.argv[1]))
"""


def test_resumed_after_a_kill_equals_the_run_without_it(tmp_path: Path) -> None:
    _run(tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, str(tmp_path / "killed")], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(Record(tmp_path / "killed").checkpoint)["rounds_done"] == 2
    _run(tmp_path / "killed")
    for round_ in (1, 3):
        whole, killed = (Observation.load(Record(tmp_path / k).observation(round_)) for k in ("whole", "killed"))
        assert all(torch.equal(whole.after[name], killed.after[name]) for name in whole.after)
        assert not any(torch.equal(whole.after[n], whole.before[n]) for n in whole.after)


def test_rounds_sample_clients_and_truth_names_them(tmp_path: Path) -> None:
    _run(tmp_path)
    truths = [Truth.load(Record(tmp_path).truth(round_)) for round_ in (1, 3)]
    for truth in truths:
        assert len(truth.labels) == 2 * len(truth.client_sizes)
        assert 3 not in truth.clients  # the attacker's images are no secret of its peers
    observed = [Observation.load(Record(tmp_path).observation(round_)) for round_ in (1, 3)]
    for truth, seen in zip(truths, observed, strict=True):
        assert seen.own_weight == (0.0 if len(truth.client_sizes) == 2 else 0.5)
        assert bool(seen.own_update) == bool(seen.own_weight)


def test_what_is_missing_of_a_finished_record_comes_back(
    tmp_path: Path,
    noise_images: type[FederatedData],
    linear_classifier: type[ImageClassifier],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    federation = Federation(model=linear_classifier, rounds=2, observed_rounds=[0, 1])
    federation.run(data, tmp_path)
    files = {path: path.read_bytes() for folder in ("observed", "truth") for path in (tmp_path / folder).iterdir()}
    assert len(files) == 8
    for lost in ("observed/round_0000.*", "observed/round_0001.safetensors", "truth/*"):
        for path in tmp_path.glob(lost):
            path.unlink()
        federation.run(data, tmp_path)
        assert {path: path.read_bytes() for path in files} == files
    monkeypatch.setattr(Record, "locked", lambda self: pytest.fail("it locks, but the folder may be read-only"))
    federation.run(data, tmp_path)


def test_an_interrupted_federation_says_how_to_go_on(
    tmp_path: Path, noise_images: type[FederatedData], capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(InProcess):
        def train(self, *arguments: object) -> Iterator:
            if Record(tmp_path).checkpoint.exists():
                raise SystemExit(1)  # as a client's Trainer after Ctrl-C
            return super().train(*arguments)

    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    with pytest.raises(KeyboardInterrupt):
        Federation(rounds=2, engine=Interrupted()).run(data, tmp_path)
    assert "Finished rounds are kept, and the same command goes on after them." in capsys.readouterr().out
    Federation(rounds=2).run(data, tmp_path)
    printed = capsys.readouterr().out
    assert "After round 1: train loss" in printed
    assert "After round 0" not in printed


def test_only_rounds_that_reach_the_attacker_are_observed(noise_images: type[FederatedData]) -> None:
    data = noise_images(num_clients=5, images_per_client=2, image_size=16)

    def rounds(observed: list[int] | None, **settings: object) -> list[int]:
        federation = Federation(**{"rounds": 8, "clients_per_round": 2, **settings}, observed_rounds=observed)
        return federation.settings(data)["observed_rounds"]

    data.setup()
    takes_part = Federation(rounds=8, clients_per_round=2).participation(data)
    reached = [r for r in range(8) if data.attacker in takes_part.sampled(r)]
    assert 0 < len(reached) < 8
    assert reached[-1] != 7
    assert rounds(None) == reached[-1:]
    assert rounds(reached) == reached
    assert rounds(None, broadcast="all") == rounds(None, clients_per_round=None) == [7]
    assert rounds([6, 7], broadcast="all") == [6, 7]
    with pytest.raises(SettingError, match=rf"take part in round 7 of.*observe round {reached[0]}, .*broadcast: all`"):
        rounds([reached[0], 7])
    with pytest.raises(SettingError, match=r"take part in any round with peers.*To change that, raise"):
        rounds(None, clients_per_round=1)


def test_an_attacker_without_images_is_sampled_like_the_others(observe: Observe) -> None:
    federation = Federation(client=STEEP, rounds=2, clients_per_round=2)
    seen = observe(federation, num_clients=3, attacker_images=0).observation
    assert (seen.own_weight, seen.own_update) == (0.0, {})
    assert any(not torch.equal(seen.before[name], seen.after[name]) for name in seen.after)


def test_another_federation_in_the_same_directory_is_refused(tmp_path: Path, noise_images: type[FederatedData]) -> None:
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    data.setup()
    Federation().run(data, tmp_path)
    with pytest.raises(RecordError, match=r"client\.lr was 0\.003 and is now 0\.5.*--observation"):
        Federation(client=LocalTraining(lr=0.5)).run(data, tmp_path)


def test_damaged_checkpoint_is_refused_in_a_sentence(tmp_path: Path, noise_images: type[FederatedData]) -> None:
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    data.setup()
    Federation(rounds=2).run(data, tmp_path)
    checkpoint = Record(tmp_path).checkpoint
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(StorageError, match="cannot be read as a checkpoint"):
        Federation(rounds=2).run(data, tmp_path)


@pytest.mark.parametrize("share_buffers", [True, False])
def test_batch_norm_statistics_are_shared_or_stay(
    observe: Observe, batch_norm_classifier: type[ImageClassifier], share_buffers: bool
) -> None:
    seen = observe(Federation(model=batch_norm_classifier, share_buffers=share_buffers)).observation
    same = torch.equal(seen.before["features.1.running_mean"], seen.after["features.1.running_mean"])
    assert same is not share_buffers
    assert not torch.equal(seen.before["features.1.weight"], seen.after["features.1.weight"])


def test_statistics_that_stay_reach_neither_other_clients_nor_a_curious_server(
    noise_images: type[FederatedData], batch_norm_classifier: type[ImageClassifier]
) -> None:
    sent, ended = [], []

    class Recording(InProcess):
        def train(self, tasks: Iterable[ClientTask], *settings: Any) -> Iterator[ClientUpdate]:
            for task in tasks:
                sent.append(task.model.state_dict()[statistic].clone())
                for result in super().train([task], *settings):
                    ended.append(result.buffers[statistic])
                    yield result

    statistic = "features.1.running_mean"
    data = noise_images(num_clients=2, images_per_client=2, image_size=16)
    data.setup()
    seat, engine = CuriousServer(), Recording()
    federation = Federation(batch_norm_classifier, share_buffers=False, seat=seat, engine=engine)
    model = federation.initial_model(data)
    new = model.state_dict()[statistic].clone()
    kept = {"0": {statistic: new + 5}}  # the other client was never sampled
    _, seen = federation._round(0, model, data, [0, 1], Kept(kept))
    assert all(torch.equal(begun, new) for begun in sent)  # the server sends all clients the same model
    assert (ended[0] > new + 2).all()  # but the first one trained with its own statistics
    assert (ended[1] < new + 2).all()
    assert all(torch.equal(kept[str(client)][statistic], ended[client]) for client in (0, 1))
    assert all(torch.equal(seen[client].after[statistic], new) for client in (0, 1))


def test_accuracy_reaches_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = Photographs(num_clients=2, images_per_client=4, image_size=16)
    data.setup()
    Federation(client=LocalTraining(lr=0.05), rounds=4).run(data, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train_loss")]
    assert [event.step for event in events.Scalars("train_accuracy")] == [1, 2, 3, 4]
    assert losses == sorted(losses, reverse=True)


class Tied(LeNet5):
    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.features.again = self.head[0]


def test_tied_parameters_are_refused(noise_images: type[FederatedData]) -> None:
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    with pytest.raises(SettingError, match=r"Tied has one parameter as features\.again\.weight and head\.0\.weight"):
        Federation(Tied).settings(data)


def test_a_normalisation_of_other_channels_is_refused(noise_images: type[FederatedData]) -> None:
    data = noise_images(num_clients=2, images_per_client=1, image_size=16, channels=1)
    with pytest.raises(SettingError, match="`mean` has 3 values, but images have 1 channel"):
        Federation(partial(LeNet5, mean=(0.4, 0.5, 0.6))).settings(data)


def test_settings_are_json_and_decide_the_fingerprint(noise_images: type[FederatedData]) -> None:
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    data.setup()
    settings = Federation().settings(data)
    assert json.loads(json.dumps(settings)).keys() == settings.keys()
    assert fingerprint(settings) != fingerprint(Federation(seed=1).settings(data))


def test_the_fingerprint_follows_the_content_of_files(tmp_path: Path) -> None:
    def settings() -> dict:
        return Federation().settings(ImageFolder(root=tmp_path, num_clients=2, images_per_client=1, image_size=16))

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), "red").save(tmp_path / name / "1.png")
    before = settings()
    assert fingerprint(settings()) == fingerprint(before)
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), "blue").save(tmp_path / name / "1.png")
    assert fingerprint(settings()) != fingerprint(before)


def test_settings_that_an_earlier_version_did_not_record_are_not_compared(tmp_path: Path) -> None:
    Record(tmp_path).claim({"seed": 0, "data": {"class": "CIFAR10"}})
    Record(tmp_path).claim({"seed": 0, "data": {"class": "CIFAR10", "content": "abc"}})
    with pytest.raises(RecordError, match="seed was 0 and is now 1"):
        Record(tmp_path).claim({"seed": 1, "data": {"class": "CIFAR10"}})


@pytest.mark.parametrize("bad", [{"lr": float("nan")}, {"momentum": 2.0}, {"weight_decay": -1.0}, {"lr": float("inf")}])
def test_local_training_needs_numbers(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"lr > 0, local_epochs >= 1.*momentum in"):
        LocalTraining(**{"lr": 0.1, **bad})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rounds": 0}, "rounds >= 1"),
        ({"server_lr": 0.0}, "server_lr > 0"),
        ({"rounds": 2, "observed_rounds": [2]}, "rounds go from 0 to 1"),
        ({"observed_rounds": []}, r"is \[\], but rounds go from 0 to 0.*null for the last"),
    ],
)
def test_impossible_federations_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Federation(**arguments)


def test_more_clients_a_round_than_there_are(observe: Observe) -> None:
    with pytest.raises(ValueError, match="only 3 clients can take part"):
        observe(Federation(clients_per_round=4))
