import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from attack_modules.evaluation.run_directory import (
    NotLogged,
    RunDirectoryError,
    SafeCheckpoints,
    claim,
    make_next_version,
    remove_if_without_results,
    runs_of,
)
from fl_lightning.storage import StorageError, unlock


def trainer(logger: TensorBoardLogger) -> Trainer:
    return Trainer(logger=logger, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)


def test_a_finished_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({}))
    for _ in range(2):  # the refusal leaves no lock
        with pytest.raises(RunDirectoryError, match="holds the results of a run"):
            claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_two_runs_in_one_directory_are_refused(tmp_path: Path) -> None:
    lock = claim(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="Another run is writing to"):
        claim(tmp_path / "run")
    unlock(lock)
    assert not list((tmp_path / "run").iterdir())
    unlock(claim(tmp_path / "run"))


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("1")  # the file alone, whatever process is said to hold it
    unlock(claim(tmp_path))


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Could not write"):
        claim(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match="Could not write"):
        make_next_version(trainer(TensorBoardLogger(tmp_path / "file", name="below")))


def test_runs_that_start_at_once_get_directories_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "name" / "version_3").mkdir(parents=True)
    (tmp_path / "name" / "version_5").write_text("no directory, but the name is taken")
    trainers = [trainer(TensorBoardLogger(tmp_path, name="name")) for _ in range(4)]
    trainers += [trainer(NotLogged(tmp_path, name="name")) for _ in range(4)]
    assert {runs_of(t) for t in trainers} == {tmp_path / "name"}
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make_next_version, trainers))
    assert made == [Path(t.log_dir) for t in trainers] == [runs_of(t) for t in trainers]
    assert sorted(path.name for path in made) == sorted(f"version_{n}" for n in range(6, 14))


def test_a_version_that_is_named_is_kept(tmp_path: Path) -> None:
    named = trainer(TensorBoardLogger(tmp_path, name="name", version=7))
    assert make_next_version(named) is None
    assert Path(named.log_dir) == tmp_path / "name" / "version_7"


def test_only_directories_without_results_are_removed(tmp_path: Path) -> None:
    for name in ("config.yaml", "hparams.yaml", "events.out.tfevents.1.host"):
        (tmp_path / "empty" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "empty" / name).touch()
    (tmp_path / "run" / "images").mkdir(parents=True)
    remove_if_without_results(tmp_path / "empty")
    remove_if_without_results(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_checkpoints_are_written_whole_and_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    SafeCheckpoints().save_checkpoint({"weight": torch.ones(2)}, path)
    assert SafeCheckpoints().load_checkpoint(path)["weight"].tolist() == [1, 1]
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    torch.save({"code": print}, path)
    with pytest.raises(Exception, match="weights_only"):
        SafeCheckpoints().load_checkpoint(path)
