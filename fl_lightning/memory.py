"""How much main memory a process can still get, and what a run is going to take."""

import os
import re
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")

LATER = 2**27
"""Bytes of libraries that are loaded on the way, and of scoring: the same of all models."""


def available_memory() -> int | None:
    """Bytes of main memory that can still be had, never too few; None where the system does not tell (Windows).

    On Linux what is available, with swap, and no more than a container is allowed; on macOS all of the machine's.
    """
    if MEMINFO.exists():
        kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", MEMINFO.read_text()))
        limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
        free = 1024 * (int(kilobytes["MemAvailable"]) + int(kilobytes["SwapFree"]))
        return free if limit == "max" else min(free, int(limit))
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def resident_memory() -> int:
    """Bytes of main memory that this process holds now, the code of libraries included; 0 where nothing tells."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def exceeds_memory(needed: int) -> str | None:
    """The clause "N GB of memory, and M GB are free" where that is so; None where it fits, or nothing is known."""
    free = available_memory()
    if free is None or needed <= free:
        return None
    return f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def whole(work: int) -> int:
    """Bytes of a run at most: the program as it is now, the work beside it, and what is the same of all models."""
    return resident_memory() + work + LATER


def forecast(work: int) -> str:
    """What a run takes at most, in one line.

    Args:
        work: bytes that it takes beside the program as it is now.
    """
    program, free = resident_memory(), available_memory()
    line = f"Memory, by forecast: {whole(work) / 1e9:.1f} GB at most, {program / 1e9:.1f} GB now"
    if free is None or work + LATER <= free:
        return f"{line}."
    return f"{line}, which is more than the {free / 1e9:.1f} GB that are free: the run may be killed, or very slow."
