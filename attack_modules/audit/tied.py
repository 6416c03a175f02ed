"""Runs a Python program that ends with the process that started it, whatever ends that one.

To be run as a script: `python tied.py PROGRAM ARGUMENTS`, with a pipe as its standard input whose other end only the
starting process holds. When that process ends, also by `kill -9`, the operating system closes the pipe. It imports
nothing of this project, so that it watches from the first moment on.
"""

import os
import runpy
import sys
import threading
from pathlib import Path

STATUS = 137
"""Exit status of a program whose starting process is gone, that of a process that was killed."""


def _end_with_the_pipe() -> None:
    while os.read(0, 1024):
        pass
    os._exit(STATUS)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_pipe, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if the program had been started itself
    runpy.run_path(sys.argv[0], run_name="__main__")
