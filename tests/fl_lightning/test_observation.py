import dataclasses
import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attack_modules.threat_model.observed import ObservedRound
from fl_lightning import storage
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.models import LeNet5
from fl_lightning.observation import Observation, describe_model
from fl_lightning.storage import StorageError, has_record, locked, write_json, write_text

Observe = Callable[..., ObservedRound]


@pytest.fixture
def stem(observe: Observe, tmp_path: Path) -> Path:
    observe(Federation()).observation.save(tmp_path / "seen")
    return tmp_path / "seen"


def test_saved_and_loaded_is_the_same(observe: Observe, tmp_path: Path) -> None:
    observation = observe(Federation()).observation
    observation.save(tmp_path / "copy")
    again = Observation.load(tmp_path / "copy")
    for group in ("before", "after", "own_update"):
        saved, loaded = getattr(observation, group), getattr(again, group)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert again.model == describe_model(LeNet5(10, (3, 16, 16)))
    assert (again.own_weight, again.image_shape, again.num_classes) == (observation.own_weight, (3, 16, 16), 10)


def test_truncated_tensors_are_refused(stem: Path) -> None:
    path = stem.with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"SHA-256 differs.*truncated"):
        Observation.load(stem)


def test_foreign_and_missing_files_are_refused(stem: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise AssertionError('the file of an Observation chose what code is run')")
    monkeypatch.syspath_prepend(tmp_path)
    facts = json.loads(stem.with_suffix(".json").read_text())
    for damage, sentence in [
        ({"version": 99}, "format version 99"),
        ({"model": {"class_path": "os.system", "init_args": {}}}, "not an `ImageClassifier`"),
        (
            {"model": {"class_path": "evil.Model", "init_args": {}}},
            "no module 'evil' is loaded.*--federation.model evil.M",
        ),
        ({"model": {"class_path": "evil", "init_args": {}}}, "no module '' is loaded"),
        ({"model": {**facts["model"], "init_args": {"colour": 1}}}, "LeNet5 cannot be built"),
        ({"model": describe_model(LeNet5(11, (3, 16, 16)))}, "do not fit LeNet5"),
        ({"model": "LeNet5"}, "not an Observation"),
    ]:
        write_json(stem.with_suffix(".json"), {**facts, **damage})
        with pytest.raises(StorageError, match=sentence):
            Observation.load(stem)
    stem.with_suffix(".json").write_text("[1, 2]")
    with pytest.raises(StorageError, match="an object is needed"):
        Observation.load(stem)
    with pytest.raises(StorageError, match="cannot be read as JSON"):
        Observation.load(tmp_path / "nowhere")


def test_full_disk_leaves_the_old_file_and_says_what_to_do(stem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = stem.with_suffix(".safetensors").read_bytes()
    observation = Observation.load(stem)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left on device.*Free disk space"):
        observation.save(stem)
    assert stem.with_suffix(".safetensors").read_bytes() == old
    assert not list(stem.parent.glob(".*.tmp"))


def test_readers_never_find_half_a_pair(stem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observation, replace = Observation.load(stem), os.replace
    seen = []

    def look_and_replace(source: Path, target: Path) -> None:
        seen.append(has_record(stem))
        replace(source, target)
        if has_record(stem):
            Observation.load(stem)

    monkeypatch.setattr(storage.os, "replace", look_and_replace)
    dataclasses.replace(observation, round=5).save(stem)
    assert seen == [False, False]
    assert Observation.load(stem).round == 5


def test_a_lock_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = threading.Event()

    def enter() -> None:
        with locked(tmp_path / "lock", "waiting"):
            inside.set()

    second = threading.Thread(target=enter)
    with locked(tmp_path / "lock", "not waiting"):
        second.start()
        while "waiting" not in capsys.readouterr().out:
            time.sleep(0.01)
        assert not inside.is_set()
    second.join(timeout=60)
    assert inside.is_set()
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Could not write"):
        write_text(tmp_path / "file" / "below", "text")


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "numbers.json", {"psnr": float("inf"), "lpips": float("nan"), "ssim": 0.5})
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"psnr": None, "lpips": None, "ssim": 0.5}


def test_weight_decay_is_taken_out(observe: Observe, relative_error: Callable[..., float]) -> None:
    plain = observe(Federation(client=LocalTraining(lr=0.01, local_epochs=2)))
    decayed = observe(Federation(client=LocalTraining(lr=0.01, local_epochs=2, weight_decay=0.1)))
    wanted, update = plain.peers_update(), decayed.peers_update()
    assert relative_error(update, wanted) > 0.05
    assert relative_error(decayed.without_weight_decay(update), wanted) < 0.01
    assert plain.without_weight_decay(wanted) is wanted
    frozen = update | {"head.0.weight": torch.zeros_like(update["head.0.weight"])}
    assert not decayed.without_weight_decay(frozen)["head.0.weight"].any()


def test_a_model_takes_over_tensors_only_when_asked_and_in_the_precision_that_is_set(observe: Observe) -> None:
    observation = observe(Federation()).observation
    weight = observation.before["head.0.weight"]
    assert observation.build_model(shared=True).head[0].weight.data_ptr() == weight.data_ptr()
    assert observation.build_model().head[0].weight.data_ptr() != weight.data_ptr()
    torch.set_default_dtype(torch.float64)
    try:
        assert observation.build_model(shared=True).head[0].weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
