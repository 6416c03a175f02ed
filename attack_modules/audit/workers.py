"""Runs the cells of a study in processes of their own, each exactly once, whatever is killed meanwhile."""

import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from attack_modules.audit import tied
from attack_modules.audit.study import Cell
from fl_lightning.errors import counted
from fl_lightning.storage import StorageError, not_writable, read_json, write_json

ATTEMPTS = 3
"""So often is a run begun that is killed from outside; a machine that is short of memory would kill it every time."""
POLL = 0.5
"""Seconds between looks at cells that another process holds, and at whether a run is to stop."""
LONGEST_SENTENCE = 400
LEAST_FREE = 100 * 2**20
"""Bytes that must be free on the disk before a run is begun; its pictures and record take some 10 MB."""

Run = Callable[[Cell, Path, int, threading.Event], tuple[int, str]]
"""Runs a cell, whose folder and number of threads are given, until the event asks it to stop -> exit status, and the
last it said."""


@dataclass(frozen=True)
class CellRecord:
    """How a cell ended; `cell.json` of its folder, whose presence says that it did.

    Attributes:
        status: `done` or `failed`.
        sentence: why it failed; empty if it did not.
        seconds: from start to end of the process.
        threads: that it computed with.
        machine: on which it ran.
        began: seconds since the epoch.
    """

    status: str
    sentence: str
    seconds: float
    threads: int
    machine: str
    began: float

    @classmethod
    def load(cls, folder: Path) -> "CellRecord | None":
        """The record of a cell's folder; None if the cell has not ended, or its record cannot be read."""
        try:
            return cls(**read_json(folder / "cell.json"))
        except (StorageError, TypeError):
            return None


def threads_each(workers: int) -> int:
    """Threads of each of so many workers that share this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


class Program:
    """A run as a process of its own, which ends with this one.

    Args:
        path: the command line's program, `cli.py`.
        out: the study's folder.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path = path
        self.out = out

    def __call__(self, cell: Cell, folder: Path, threads: int, stop: threading.Event) -> tuple[int, str]:
        command = [sys.executable, tied.__file__, str(self.path), "fit", *cell.placed(self.out)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "200"}
        log = folder / "log.txt"
        try:
            output = log.open("wb")
        except OSError as error:
            raise not_writable(log, error) from error
        with output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # never written to: that it ends is the sign to end
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
            )
        while True:
            try:
                status = process.wait(POLL)
                break
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    process.kill()
        process.stdin.close()
        return status, _last_words(log.read_text(encoding="utf-8", errors="replace"))


class Workers:
    """Threads that take up a study's open cells, in their order, and run each as a process.

    A cell is held by a lock of the operating system, which ends with the process that holds it. So any number of
    processes, also on other machines with the same folder, may work on one study, and what a killed one held is taken
    up by the others, or by the next command. What counts is the cell's record on disk.

    Args:
        number: of cells that run at once, >= 1.
        run: runs a cell.
        out: the study's folder.
        expected: seconds that a cell is expected to take, None if nothing is known; asked again before each cell.
        budget: seconds after which no cell is begun; None for no limit. A cell that is not expected to end in time is
            not begun either, but for the first.
    """

    def __init__(
        self,
        number: int,
        run: Run,
        out: Path,
        expected: Callable[[Cell], float | None],
        budget: float | None = None,
    ) -> None:
        self.number = number
        self.run = run
        self.out = out
        self.expected = expected
        self.budget = budget
        self._guard = threading.Lock()
        self._here: set[str] = set()  # names of cells that a thread of this process holds
        self._done: set[str] = set()  # names of cells that were seen to have ended
        self._began = 0
        self._left: tuple[float, float | None] = (-math.inf, None)  # when it was estimated, and the seconds
        self._stop = threading.Event()
        self._broken: BaseException | None = None

    def work(self, cells: Sequence[Cell], describe: Callable[[Cell], str]) -> None:
        """Run all cells that have no record yet.

        Args:
            cells: in the order in which they are begun.
            describe: a cell that ended, in a few words.

        Raises:
            StorageError: the study's folder cannot be written, or its disk is nearly full. No run is begun then, but
                those that are at work end; what they left is taken up by the next command.
        """
        self._start = time.monotonic()
        self._cells = list(cells)
        open_ = [cell for cell in cells if not self._ended(cell)]
        with Progress(TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn()) as progress:
            task = progress.add_task("Cells", total=len(cells), completed=len(cells) - len(open_))

            def tell(cell: Cell, seconds: float) -> None:
                done, ended = len(self._done), describe(cell)
                left = self.remaining()
                rest = "" if left is None or done == len(cells) else f"; about {in_words(left)} left"
                progress.print(f"[{done}/{len(cells)}] {cell.title}: {ended}, {seconds:.0f} s{rest}")
                progress.update(task, completed=done)

            threads = [threading.Thread(target=self._loop, args=(tell,), daemon=True) for _ in range(self.number)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)  # a join without end would keep Ctrl-C waiting
            except BaseException:
                self._stop.set()
                for thread in threads:
                    thread.join(4 * POLL)  # until their runs have ended
                raise
        if self._broken:
            raise self._broken

    def remaining(self) -> float | None:
        """Seconds that the open cells are expected to take, None if nothing is known of one of them."""
        if time.monotonic() - self._left[0] > POLL:  # not after each of a thousand short runs
            left = [self.expected(cell) for cell in self._cells if cell.name not in self._done]
            self._left = (time.monotonic(), None if None in left else sum(left) / self.number)
        return self._left[1]

    def _ended(self, cell: Cell) -> bool:
        if cell.name not in self._done and (cell.folder(self.out) / "cell.json").exists():
            self._done.add(cell.name)
        return cell.name in self._done

    def _loop(self, tell: Callable[[Cell, float], None]) -> None:
        try:
            while not self._is_over():
                taken = False
                for cell in [cell for cell in self._cells if cell.name not in self._done]:
                    if self._is_late() or self._is_over():
                        return
                    taken |= self._take(cell, tell)
                open_ = [cell for cell in self._cells if not self._ended(cell)]
                if not any(map(self._fits, open_)):
                    return
                if not taken:
                    time.sleep(POLL)  # others hold them; if they are killed, these cells are taken up here
        except BaseException as error:
            self._broken = self._broken or error
            with self._guard:
                at_work = len(self._here)
            if at_work:
                print(f"No run is begun any more, {counted(at_work, 'run')} at work will end. {error}", flush=True)

    def _is_over(self) -> bool:
        return self._stop.is_set() or self._broken is not None

    def _is_late(self) -> bool:
        return self.budget is not None and time.monotonic() - self._start >= self.budget

    def _fits(self, cell: Cell) -> bool:
        if self.budget is None or not self._began:
            return True
        expected = self.expected(cell) or 0.0
        return time.monotonic() - self._start + expected <= self.budget

    def _take(self, cell: Cell, tell: Callable[[Cell, float], None]) -> bool:
        """Run a cell that nobody holds; whether it was run."""
        folder = cell.folder(self.out)
        with self._guard:
            if cell.name in self._here or self._is_over() or not self._fits(cell):
                return False
            self._here.add(cell.name)
        try:
            lock = FileLock(folder / "worker.lock")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
            except Timeout:
                return False
            except (OSError, NotImplementedError) as error:  # the latter where a file system knows no locks
                raise not_writable(folder, error) from error
            try:
                if self._ended(cell):  # meanwhile
                    return False
                self._began += 1
                record = self._attempts(cell, folder)
                if self._stop.is_set():
                    return True
                write_json(folder / "cell.json", asdict(record))
                self._done.add(cell.name)
            finally:
                lock.release()  # its file stays: another process may be about to lock it
        finally:
            with self._guard:
                self._here.discard(cell.name)
        tell(cell, record.seconds)
        return True

    def _attempts(self, cell: Cell, folder: Path) -> CellRecord:
        threads, began = threads_each(self.number), time.time()
        if (seconds := _left_complete(folder)) is not None:  # its record alone could not be written
            return CellRecord("done", "", seconds, threads, platform.node(), began)
        self._refuse_full_disk()
        for attempt in range(1, ATTEMPTS + 1):
            shutil.rmtree(folder / "run", ignore_errors=True)  # of a run that was killed
            started = time.monotonic()
            status, words = self.run(cell, folder, threads, self._stop)
            seconds = time.monotonic() - started
            if status == 0 or not _was_killed(status) or self._stop.is_set():
                break
            words = f"The run was killed {attempt} times (status {status}), perhaps because memory was short."
        if status != 0:
            self._refuse_full_disk()  # which is no fault of the cell, so it stays open
        sentence = "" if status == 0 else (words or f"The run ended with status {status}.")[:LONGEST_SENTENCE]
        return CellRecord(
            "done" if status == 0 else "failed", sentence, round(seconds, 2), threads, platform.node(), began
        )

    def _refuse_full_disk(self) -> None:
        free = shutil.disk_usage(self.out).free
        if free < LEAST_FREE:
            raise StorageError(
                f"The disk of '{self.out}' is nearly full: {free >> 20} MiB are free, but a run needs "
                f"{LEAST_FREE >> 20}. Free space, and the same command goes on; all runs that ended are kept."
            )


def _left_complete(folder: Path) -> float | None:
    """Seconds of an attack whose results are all there, as after its record could not be written; else None."""
    try:
        results = read_json(folder / "run" / "results.json")
    except StorageError:
        return None
    return float(results["seconds"]) if results.get("finished") and results.get("complete") else None


def in_words(seconds: float) -> str:
    """A duration: `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _was_killed(status: int) -> bool:
    """Whether a signal that a process cannot answer ended it (on Windows, nothing tells)."""
    return status in (-9, tied.STATUS)


def _last_words(log: str) -> str:
    """Why a program ended: its last sentence that begins with `Error:`, or else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return (errors or lines or [""])[-1]
