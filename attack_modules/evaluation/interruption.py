"""Ctrl-C and SIGTERM: a run ends after its step, with the best so far."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"
"""Progress bars hide the cursor of a terminal, and a process that is ended at once would leave it so."""


class Interruption:
    """Handles SIGINT and SIGTERM while it listens: the first is remembered, a second one ends the process at once.

    Attributes:
        received: the signal that asks the run to stop; None if there was none.
        at_once: raise SystemExit already at the first, as long as there is no step to wait for.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.at_once = True
        self._listens = False
        self._former: dict[signal.Signals, Any] = {}

    @property
    def status(self) -> int:
        """Exit status of the process: as the system's own for a process that a signal ended, 0 if there was none."""
        return 128 + self.received if self.received else 0

    def listen(self) -> None:
        """Take over the signals; in other threads than the main one, Python does not allow it."""
        if threading.current_thread() is threading.main_thread():
            self._listens = True
            for number in SIGNALS:
                former = signal.signal(number, self._handle)
                self._former.setdefault(number, former)

    def end(self) -> None:
        """Give the signals back to those who had them."""
        if self._listens:
            self._listens = False
            for number, former in self._former.items():
                signal.signal(number, former)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._listens:  # after an error, Lightning puts back the handlers that it has found
            signal.signal(number, self._former[signal.Signals(number)])
            return signal.raise_signal(number)
        self.received = signal.Signals(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self.at_once:
            raise SystemExit(self.status)
        cursor = SHOW_CURSOR if sys.stderr.isatty() else ""
        note = "Interrupted: the best so far is written after this step. A second Ctrl-C ends at once."
        os.write(2, f"{cursor}\n{note}\n".encode())  # a signal may come in the middle of a print
