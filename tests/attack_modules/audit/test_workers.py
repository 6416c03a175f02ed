"""Each cell is run exactly once, whatever is killed meanwhile."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from attack_modules.audit import tied
from attack_modules.audit.study import Cell, Scenario, Study
from attack_modules.audit.workers import LEAST_FREE, CellRecord, Program, Workers
from fl_lightning.errors import AuditError, counted
from fl_lightning.storage import StorageError, write_json


def work(study: Study, out: Path, run: object, number: int = 2, budget: float | None = None) -> list[CellRecord | None]:
    cells = study.cells()
    Workers(number, run, out, lambda cell: None if budget is None else 5.0, budget).work(cells, lambda cell: "done")
    return [CellRecord.load(cell.folder(out)) for cell in cells]


def test_two_machines_on_one_folder_run_every_cell_once(study: Study, tmp_path: Path) -> None:
    begun: list[str] = []

    def run(cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
        begun.append(cell.name)
        time.sleep(0.01)
        return 0, ""

    machines = [threading.Thread(target=work, args=(study, tmp_path, run)) for _ in range(2)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert Counter(begun) == Counter(cell.name for cell in study.cells())
    work(study, tmp_path, run)  # the same command again
    assert len(begun) == 12


def test_a_killed_run_is_taken_up_and_a_failed_one_is_a_sentence(study: Study, tmp_path: Path) -> None:
    begun: Counter = Counter()

    def run(cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
        assert not (folder / "run").exists()  # what a killed run left is removed
        (folder / "run").mkdir()
        begun[cell.title] += 1
        if cell.title == "told / none / seed 0" and begun[cell.title] < 3:
            return -signal.SIGKILL, ""
        if cell.title == "told / none / seed 1":
            return tied.STATUS, ""
        return (1, "There is no 'x'.") if cell.title == "told / none / seed 2" else (0, "")

    work(study, tmp_path, run)
    found = {cell.title: CellRecord.load(cell.folder(tmp_path)) for cell in study.cells()}
    assert found["told / none / seed 0"].status == "done"
    assert begun["told / none / seed 0"] == begun["told / none / seed 1"] == 3
    assert "was killed 3 times" in found["told / none / seed 1"].sentence
    assert found["told / none / seed 2"].sentence == "There is no 'x'."
    assert [record.status for record in found.values()].count("failed") == 2


def test_a_budget_begins_the_most_telling_cells_first(study: Study, tmp_path: Path) -> None:
    begun = []

    def run(cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
        begun.append(cell)
        return 0, ""

    work(study, tmp_path, run, number=1, budget=4.0)  # each is expected to take 5 s
    assert begun == study.cells()[:1]
    work(study, tmp_path, run, number=1, budget=6.0)
    assert begun == study.cells()


def test_a_folder_that_cannot_be_written_is_a_sentence(study: Study, tmp_path: Path) -> None:
    (tmp_path / "cells").touch()
    with pytest.raises(AuditError, match="Could not write"):
        work(study, tmp_path, lambda cell, folder, threads, stop: (0, ""))


def test_the_overhead_of_a_cell_is_small(study: Study, tmp_path: Path) -> None:
    many = Scenario("many", grid={"knowledge.num_images": list(range(100))}, defences=["none"])
    study = replace(study, scenarios=[many], seeds=[0])
    began = time.monotonic()
    assert all(work(study, tmp_path, lambda cell, folder, threads, stop: (0, "")))
    assert time.monotonic() - began < 30  # on a busy machine


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_a_run_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(
        "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    command = [sys.executable, tied.__file__, str(tmp_path / "long.py"), str(tmp_path / "pid")]
    starter = f"import subprocess, time; subprocess.Popen({command}, stdin=subprocess.PIPE); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", starter])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_alive(child))


def wait_for(true: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


PROGRAM = """
import json, os, sys, time
from pathlib import Path
logger = next(word for word in sys.argv if word.startswith("--trainer.logger="))
folder = Path(json.loads(logger.partition("=")[2])["init_args"]["save_dir"])
with (folder / "begun").open("a") as file:
    file.write(f"{os.getpid()} begins\\n")
time.sleep(0.3)
(folder / "run").mkdir()  # fails where another run is at work
with (folder / "begun").open("a") as file:
    file.write(f"{os.getpid()} ends\\n")
"""

AUDIT = """
import pickle, sys
from pathlib import Path
from attack_modules.audit.workers import Program, Workers
study, out, program = pickle.loads(Path(sys.argv[1]).read_bytes())
Workers(2, Program(program, out), out, lambda cell: None).work(study.cells(), lambda cell: "done")
"""


@pytest.mark.slow
def test_kills_of_runs_and_of_the_audit_at_any_time_lose_and_repeat_nothing(study: Study, tmp_path: Path) -> None:
    import pickle
    import random

    out = tmp_path / "out"
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "study.pickle").write_bytes(pickle.dumps((study, out, tmp_path / "program.py")))
    command = [sys.executable, "-c", AUDIT, str(tmp_path / "study.pickle")]
    chance = random.Random(0)

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})

    cells = study.cells()
    for kill in range(10):
        audit = start()
        begun = [cell.folder(out) / "begun" for cell in cells]
        before = sum(path.read_text().count("begins") for path in begun if path.exists())
        wait_for(
            lambda before=before, begun=begun, audit=audit: (
                audit.poll() is not None
                or sum(path.read_text().count("begins") for path in begun if path.exists()) > before
            ),
            120,
        )
        time.sleep(0.4 * chance.random())
        running = [
            path.read_text().split()[-2] for path in begun if path.exists() and "begins" in path.read_text()[-8:]
        ]
        if kill % 2 and running and is_alive(int(running[0])):
            os.kill(int(running[0]), signal.SIGKILL)  # a run: the audit takes its cell up
            time.sleep(0.2)
        audit.kill()
        audit.wait()
        time.sleep(0.2)  # its runs end with it
    audits = [start(), start()]  # two machines finish it
    assert [audit.wait(300) for audit in audits] == [0, 0]
    for cell in cells:
        assert CellRecord.load(cell.folder(out)).status == "done"
        assert (cell.folder(out) / "begun").read_text().split()[-1] == "ends"


def test_a_program_says_why_it_failed(study: Study, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nprint('Warning: x')\nprint('Error: It is too large.', file=sys.stderr)\nsys.exit(1)\n"
    )
    cell = study.cells()[0]
    cell.folder(tmp_path).mkdir(parents=True)
    assert Program(program, tmp_path)(cell, cell.folder(tmp_path), 1, Event()) == (1, "It is too large.")


def test_a_full_disk_ends_the_study_in_a_sentence_and_loses_no_run(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: Counter = Counter()
    numbers, fourth_begins, third_ends = count(), Event(), Event()
    space = {"free": LEAST_FREE, "records": 2}

    def run(cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
        begun[cell.name] += 1
        number = next(numbers)
        if number == 2:
            assert fourth_begins.wait(20)
        if number == 3:  # it is at work while the record of the third cannot be written
            fourth_begins.set()
            assert third_ends.wait(20)
            assert not stop.is_set()
        write_json(folder / "run/results.json", {"finished": True, "complete": cell.seed < 2, "seconds": 7.0})
        return 0, ""

    def written(path: Path, content: dict) -> None:
        space["records"] -= 1
        if space["records"] == -1:
            raise StorageError("Could not write: No space left on device.")
        write_json(path, content)

    def said(number: int, word: str) -> str:  # of the runs that will end, when no other begins any more
        third_ends.set()
        return counted(number, word)

    monkeypatch.setattr("attack_modules.audit.workers.write_json", written)
    monkeypatch.setattr("attack_modules.audit.workers.counted", said)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=space["free"]))
    with pytest.raises(StorageError, match="No space left"):
        work(study, tmp_path, run)
    assert "No run is begun any more, 1 run at work will end." in capsys.readouterr().out.replace("\n", " ")
    assert sum(begun.values()) == 4
    assert sum((cell.folder(tmp_path) / "cell.json").exists() for cell in study.cells()) == 3
    space["free"] -= 1
    with pytest.raises(StorageError, match=r"nearly full: 99 MiB are free, .* all runs that ended are kept"):
        work(study, tmp_path, run)  # but not before the record of the fourth is made up for
    space["free"] = LEAST_FREE
    assert all(record.status == "done" for record in work(study, tmp_path, run))
    assert set(begun.values()) == {1}


def test_a_run_that_fails_on_a_full_disk_stays_open(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [LEAST_FREE, 0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free.pop(0)))
    with pytest.raises(StorageError, match="nearly full: 0 MiB"):
        work(study, tmp_path, lambda cell, folder, threads, stop: (1, "Could not write."), number=1)
    assert not list(tmp_path.rglob("cell.json"))
