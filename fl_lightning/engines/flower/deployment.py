"""Flower's deployment engine on this machine: a SuperLink, SuperNodes and a run, as processes on loopback."""

import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from fl_lightning.errors import AuditError

LOOPBACK = "127.0.0.1"
START = 600.0
"""Seconds in which a process must have started."""
PATIENCE = 5.0
"""Seconds in which a process should have ended by itself."""
PR_SET_PDEATHSIG = 1

Values = Mapping[str, str | int]
"""Of a node's or a run's configuration, by name."""


class FlowerError(AuditError):
    """Flower is missing, or a part of it failed."""


class Deployment:
    """Flower's processes, from the start of the block to its end, whatever ends it.

    They listen on 127.0.0.1 only, with telemetry and the look-up of new versions off. SuperNodes end before the
    SuperLink, for which they would otherwise wait. If this process is killed, the operating system ends them (Linux).

    Args:
        folder: for what Flower writes, and the logs; empty, and removed by the caller.
        nodes: the configuration of each SuperNode.
        logs: where the logs go if the block ends with an error.

    Raises:
        FlowerError: Flower is not installed, or a process ended too early; it says where the logs are.
    """

    def __init__(self, folder: Path, nodes: Sequence[Values], logs: Path) -> None:
        refuse_missing_flower()
        self.folder = folder
        self.nodes = nodes
        self.logs = logs
        self._link: subprocess.Popen | None = None
        self._supernodes: list[subprocess.Popen] = []

    def __enter__(self) -> "Deployment":
        try:
            self._start()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        end(self._supernodes)
        end([self._link] if self._link else [])
        if isinstance(error, Exception):
            with suppress(OSError):  # the error itself matters more
                shutil.copytree(self.folder / "logs", self.logs, dirs_exist_ok=True)

    def check(self) -> None:
        """Notice a process that has ended.

        Raises:
            FlowerError: one has.
        """
        for name, process in self._processes():
            if process.poll() is not None:
                raise FlowerError(
                    f"Flower's {name} has ended with status {process.returncode}, so the round cannot be finished. "
                    f"Finished rounds are kept, and the same command goes on after them. Its log: '{self.logs}'."
                )

    def wait(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait for something to be done, while all processes run.

        Raises:
            FlowerError: a process has ended, or the time is over.
        """
        until = time.monotonic() + seconds
        while not done():
            self.check()
            if time.monotonic() > until:
                raise FlowerError(
                    f"Flower did not {what} in {seconds:g} s. Free the machine of other work, or give it longer "
                    f"(`federation.engine.timeout` of a round), and run the same command again. Logs: '{self.logs}'."
                )
            time.sleep(0.1)

    def submit(self, app: Path, changes: Values) -> None:
        """Start a run of a Flower app.

        Args:
            app: its folder.
            changes: of its configuration.

        Raises:
            FlowerError: Flower refuses the app.
        """
        submitted = self._spawn(["flwr", "run", str(app), "local", "--run-config", _config(changes)], "run")
        try:
            self.wait(lambda: submitted.poll() is not None, f"take the app '{app.name}'", START)
        finally:
            end([submitted])
        if submitted.returncode:
            raise FlowerError(f"Flower refused the app '{app}': {self._last_line('run')}. Logs: '{self.logs}'.")

    def _start(self) -> None:
        (self.folder / "logs").mkdir()
        link, *ports = free_ports(1 + len(self.nodes))
        (self.folder / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "{LOOPBACK}:{link}"\ninsecure = true\n'
        )
        at = ["--insecure", "--host", LOOPBACK, "--port"]
        self._link = self._spawn(
            ["flower-superlink", *at, str(link), "--disable-runtime-dependency-installation"], "superlink"
        )
        self.wait(lambda: _answers(f"http://{LOOPBACK}:{link}/health"), "start its SuperLink", START)
        for number, (node, port) in enumerate(zip(self.nodes, ports, strict=True)):
            command = ["flower-supernode", *at, str(port), "--superlink", f"{LOOPBACK}:{link}"]
            self._supernodes.append(self._spawn([*command, "--node-config", _config(node)], f"supernode_{number}"))

    def _spawn(self, command: Sequence[str], name: str) -> subprocess.Popen:
        programs = Path(sys.executable).parent  # of this environment, also where it is not activated
        environment = {
            **os.environ,
            "FLWR_HOME": str(self.folder),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": LOOPBACK,
            "no_proxy": LOOPBACK,
            "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        }
        with (self.folder / "logs" / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [str(programs / command[0]), *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours, and ends them in their order
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def _processes(self) -> list[tuple[str, subprocess.Popen]]:
        links = [("SuperLink", self._link)] if self._link else []
        return links + [(f"SuperNode of client {i}", node) for i, node in enumerate(self._supernodes)]

    def _last_line(self, name: str) -> str:
        lines = (self.folder / "logs" / f"{name}.log").read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")[:150]


def refuse_missing_flower() -> None:
    """Refuse an environment in which Flower cannot be started.

    Raises:
        FlowerError: it is not installed, or this is Windows.
    """
    if os.name != "posix":
        raise FlowerError(
            "`federation.engine: Flower` needs Linux or macOS, whose processes it can end as a group. Leave the engine "
            "out: clients then train in this process, with the same results."
        )
    if importlib.util.find_spec("flwr") is None:
        raise FlowerError(
            "`federation.engine: Flower` needs the package `flwr`, which is not installed. Run `pip install -e "
            "'.[flower]'` (Python 3.11 or later), or leave the engine out: clients then train in this process, "
            "with the same results."
        )


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes with their children, by their numbers: asked first, then killed."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + PATIENCE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(until - time.monotonic(), 0))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group that it leads, since it began a session
        process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _answers(address: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(address, timeout=2):
            return True
    except (URLError, OSError):
        return False


def _config(values: Values) -> str:
    """`name=value` pairs in TOML, as Flower's programs read them."""
    quoted = ((name, f'"{value}"' if isinstance(value, str) else value) for name, value in values.items())
    return " ".join(f"{name}={value}" for name, value in quoted)
