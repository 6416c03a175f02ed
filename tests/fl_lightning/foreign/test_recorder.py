import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_lightning import storage
from fl_lightning.errors import SettingError
from fl_lightning.foreign import Recorder, recorded_rounds
from fl_lightning.state_files import read_state
from fl_lightning.storage import StorageError

State = dict[str, Tensor]


def model(seed: int) -> State:
    torch.manual_seed(seed)
    return {"last.weight": torch.randn(3, 4), "last.bias": torch.randn(3), "norm.count": torch.tensor(seed)}


def rounds(directory: Path) -> list[int]:
    return [recorded.round for recorded in recorded_rounds(directory)]


def assert_equal(found: object, expected: State) -> None:
    assert isinstance(found, dict) and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for t in range(3):
        recorder.global_model(model(t), t)
    recorder.own_model(model(9), 0, num_examples=8)
    update = {"last.weight": torch.full((3, 4), 0.5)}
    recorder.own_update(update, 1, weight=0.25)
    first, second = recorded_rounds(tmp_path)
    assert (first.round, first.own_weight, first.num_examples) == (0, None, 8)
    assert (second.round, second.own_weight, second.num_examples) == (1, 0.25, None)
    assert_equal(read_state(first.before), model(0))
    assert_equal(read_state(first.after), model(1))
    assert_equal(read_state(first.own), model(9))
    assert_equal(read_state(second.own), model(1) | {"last.weight": model(1)["last.weight"] - 0.5})


def test_modules_arrays_and_nameless_lists_are_states(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layer[1].weight = layer[0].weight  # shared memory, which safetensors refuses
    recorder = Recorder(tmp_path)
    recorder.global_model(layer, 0)
    recorder.global_model({name: tensor.numpy() for name, tensor in layer.state_dict().items()}, 1)
    recorder.global_model([np.arange(3.0), *([np.int64(1)] * 11)], 2)
    states = [read_state(recorded.before) for recorded in recorded_rounds(tmp_path)]
    assert_equal(states[0], layer.state_dict())
    assert_equal(states[1], layer.state_dict())
    nameless = read_state(tmp_path / "global_0002.safetensors")
    assert [tensor.tolist() for tensor in nameless] == [[0.0, 1.0, 2.0], *([1] * 11)]


def test_the_disk_holds_the_last_rounds(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, keep=2)
    (tmp_path / "global_best.pt").touch()  # not ours
    for t in range(7):
        recorder.global_model(model(t), t)
        recorder.own_model(model(t), t)
    assert rounds(tmp_path) == [4, 5]
    assert len(list(tmp_path.iterdir())) == 1 + 2 * (3 + 3)
    with pytest.raises(SettingError, match="`keep` is 0"):
        Recorder(tmp_path, keep=0)


def test_a_client_that_begins_again_goes_on_and_another_run_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for t in range(4):  # a process for each message, as on Flower
        Recorder(tmp_path).global_model(model(t), t)
        Recorder(tmp_path).own_model(model(t), t)
    Recorder(tmp_path).global_model(model(3), 3)
    assert (rounds(tmp_path), caplog.messages) == ([0, 1, 2], [])
    again = Recorder(tmp_path)
    again.global_model(model(0), 0)  # the same initial model
    again.global_model(model(11), 1)
    again.global_model(model(12), 2)
    first, second = recorded_rounds(tmp_path)
    assert_equal(read_state(second.after), model(12))
    assert (first.own, second.own) == (None, None)
    assert len(caplog.messages) == 1 and "another run" in caplog.text


def test_training_goes_on_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").touch()
    full = Recorder(tmp_path / "full")
    full.global_model(model(0), 0)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "save_file", no_space)
        full.global_model(model(1), 1)
        full.own_model(model(1), 0)
    full.global_model(model(2), 2)
    assert sorted(path.name for path in (tmp_path / "full").glob("*.json")) == ["global_0000.json", "global_0002.json"]
    Recorder(tmp_path / "file" / "below").global_model(model(0), 0)
    Recorder(tmp_path / "update").own_update(model(0), 0)  # of a round whose model was not recorded
    Recorder(tmp_path / "none").global_model({"optimizer": object()}, 0)
    Recorder(tmp_path / "empty").global_model({}, 0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 5  # one for each recorder
    assert "Could not write" in caplog.messages[0] and "training goes on" in caplog.messages[0]
    with pytest.raises(StorageError, match=r"no two consecutive global models \(those of round 0, 2 are there\)"):
        recorded_rounds(tmp_path / "full")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of the process")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_while_writing_leaves_the_former_rounds(tmp_path: Path) -> None:
    for t in range(2):
        Recorder(tmp_path).global_model(model(t), t)
    for moment in (1, 2):  # before the tensors have their name, and between them and their description
        if not (child := os.fork()):
            replace, calls = os.replace, []

            def replace_or_die(*paths: Path) -> None:
                calls.append(paths)  # noqa: B023 - in a process of its own
                if len(calls) == moment:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*paths)  # noqa: B023

            storage.os.replace = replace_or_die
            Recorder(tmp_path).global_model(model(2), 2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert rounds(tmp_path) == [0]
    left = list(tmp_path.glob(".*.tmp"))
    assert left
    for path in left:
        os.utime(path, (0, 0))
    Recorder(tmp_path).global_model(model(2), 2)
    assert rounds(tmp_path) == [0, 1]
    assert not list(tmp_path.glob(".*.tmp"))
