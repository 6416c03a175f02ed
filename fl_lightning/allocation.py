"""Memory that glibc keeps instead of giving it back to the kernel."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let this process reuse large freed blocks.

    Activations and gradients are blocks of 100 MB that live for milliseconds. By default glibc maps each anew and
    unmaps it when it is freed, so that the kernel must zero every page of every temporary: most of the time of a step
    on a CPU. See `mallopt(3)`; does nothing on other systems.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**28)
