import json
import os
from pathlib import Path

import pytest

from attack_modules.evaluation.run_directory import RunDirectoryError, claim


def test_a_finished_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({}))
    with pytest.raises(RunDirectoryError, match="holds the results of a finished run"):
        claim(tmp_path)


def test_two_runs_in_one_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("1")  # process 1 is alive
    with pytest.raises(RunDirectoryError, match="Process 1 is writing to"):
        claim(tmp_path)


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("999999999")
    assert claim(tmp_path).read_text() == str(os.getpid())
