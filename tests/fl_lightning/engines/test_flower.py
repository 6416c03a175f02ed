import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fl_lightning.client import ClientTask, LocalTraining, local_update
from fl_lightning.data import FederatedData, Photographs
from fl_lightning.engines import Engine, Flower, InProcess
from fl_lightning.engines.flower import deployment
from fl_lightning.engines.flower.deployment import FlowerError, free_ports
from fl_lightning.engines.flower.private import Private
from fl_lightning.errors import SettingError
from fl_lightning.federation import Federation
from fl_lightning.models import ImageClassifier, LeNet5
from fl_lightning.observation import Observation
from fl_lightning.record import Record

needs_flower = pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="needs the extra `flower`")
TRAINING = LocalTraining(lr=0.1, local_epochs=2, batch_size=1)


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - tensor.double()).abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize("own_buffers", [None, {}, {"features.1.running_mean": torch.full((8,), 5.0)}])
def test_a_device_gives_the_result_of_local_update(
    tmp_path: Path,
    noise_images: type[FederatedData],
    batch_norm_classifier: type[ImageClassifier],
    own_buffers: dict[str, torch.Tensor] | None,
) -> None:
    """Statistics that a client keeps cross the wire neither way."""
    data = noise_images(num_clients=2, images_per_client=4, image_size=16)
    data.setup()
    model = batch_norm_classifier(10, (3, 16, 16))
    task = ClientTask(model, data.clients[1], 7, client=1, own_buffers=own_buffers)
    training = replace(TRAINING, batch_size=2)
    received = Private(tmp_path / "1").give(task, training, "cpu")
    sent, num_examples = Private(tmp_path / "1").train(received)
    found = Private(tmp_path / "1").take(received, sent, dict(task.model.named_parameters()).keys())
    expected = local_update(task, training)
    assert difference({name: torch.from_numpy(array) for name, array in received.items()}, model.state_dict()) == 0
    assert ("features.1.running_mean" in sent) == (own_buffers is None)
    assert (expected.buffers["features.1.running_mean"].mean() > 2) == bool(own_buffers)
    assert found.num_examples == num_examples == 4
    assert difference(found.update, expected.update) < 1e-6
    assert difference(found.buffers, expected.buffers) < 1e-6
    assert difference(found.update, {name: torch.zeros_like(t) for name, t in expected.update.items()}) > 1e-2


class Announced(InProcess):
    """Notes who receives models without training."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []

    def announce(self, model: ImageClassifier, round_: int, clients: Sequence[int]) -> None:
        self.calls.append((round_, list(clients)))


def test_models_are_announced_to_those_that_receive_them(
    tmp_path: Path, noise_images: type[FederatedData], linear_classifier: type[ImageClassifier]
) -> None:
    data = noise_images(num_clients=3, images_per_client=1, image_size=16)
    engine = Announced()
    federation = Federation(linear_classifier, rounds=2, clients_per_round=2, broadcast="all", engine=engine)
    federation.run(data, tmp_path)
    idle = [sorted({0, 1, 2} - set(federation.participation(data).sampled(round_))) for round_ in range(2)]
    assert engine.calls == [(0, idle[0]), (1, [0, 1, 2]), (1, idle[1]), (2, [0, 1, 2])]
    sampled = Federation(linear_classifier, rounds=2, clients_per_round=2).participation(data)
    assert [sampled.receivers(round_) for round_ in range(2)] == [sampled.sampled(round_) for round_ in range(2)]


def test_without_flower_it_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FlowerError, match=r"pip install -e '\.\[flower\]'"), Flower().running(2, 1, tmp_path):
        pass
    with pytest.raises(SettingError, match="timeout` is 0"):
        Flower(timeout=0)
    assert len(set(free_ports(5))) == 5


def observed(directory: Path, rounds: Sequence[int], engine: Engine) -> list[Observation]:
    data = Photographs(num_clients=3, images_per_client=2, image_size=16)
    federation = Federation(
        client=TRAINING, rounds=3, clients_per_round=2, broadcast="all", observed_rounds=list(rounds), engine=engine
    )
    federation.run(data, directory)
    return [Observation.load(Record(directory).observation(round_)) for round_ in rounds]


@needs_flower
@pytest.mark.slow
def test_flower_gives_what_this_process_gives(tmp_path: Path) -> None:
    """Two of three clients in each round, and every aggregate reaches the observer: 60 s of two quiet cores."""
    rounds = range(3)
    here, there = observed(tmp_path / "here", rounds, InProcess()), observed(tmp_path / "there", rounds, Flower())
    assert {bool(seen.own_weight) for seen in here} == {True, False}  # the observer is not always sampled
    for expected, found in zip(here, there, strict=True):
        assert (found.own_weight, found.model) == (expected.own_weight, expected.model)
        assert difference(found.before, expected.before) < 1e-6
        assert difference(found.after, expected.after) < 1e-6
        if expected.own_update:
            assert difference(found.own_update, expected.own_update) < 1e-6
        assert difference(found.before, expected.after) > 1e-3


def group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@needs_flower
@pytest.mark.slow
def test_failures_on_flower_are_sentences_and_leave_no_process(
    tmp_path: Path, noise_images: type[FederatedData]
) -> None:
    """A client that fails, then a SuperNode that is killed: 20 s of two quiet cores."""
    data = noise_images(num_clients=2, images_per_client=1, image_size=16)
    data.setup()
    engine = Flower()

    def train(image_size: int) -> None:
        tasks = [ClientTask(LeNet5(10, (3, image_size, image_size)), data.clients[c], 0, client=c) for c in range(2)]
        list(engine.train(tasks, TRAINING, "cpu"))

    died = r"SuperNode of client 1 has ended with status -9.*goes on after them"
    with pytest.raises(FlowerError, match=died) as error, engine.running(2, 1, tmp_path):
        run = engine._run
        with pytest.raises(FlowerError, match=r"Client 0 fails to train on Flower.*shape") as failed:
            train(image_size=32)
        processes = [process for _, process in run.deployment._processes()]
        processes[-1].kill()
        train(image_size=16)
    assert max(len(str(error.value)), len(str(failed.value))) <= 400
    until = time.monotonic() + 10  # in which what was killed is also reaped
    while any(group_exists(process.pid) for process in processes):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert (tmp_path / "flower_logs/supernode_0.log").stat().st_size > 0
    assert not run.deployment.folder.exists()
