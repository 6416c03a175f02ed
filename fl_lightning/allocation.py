"""Tuning of memory for training on a CPU: glibc's allocator, and pages of mapped files."""

import ctypes
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MADV_DONTNEED, MADV_PAGEOUT = 4, 21
SMAPS = Path("/proc/self/smaps")
MAPPED_LIBRARY = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) r-.. \S+ \S+ \S+ +/.*\.so[.\d]*\n(?:[A-Z].*\n)*?Anonymous: +0 kB\n",
    re.MULTILINE,
)
"""A part of a library's file in memory that cannot be written to and holds nothing but the file's content."""
LARGE = 2**26
"""Bytes of a tensor from which on memory is worth more than the time that saving it takes."""


def has_large(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors is so large that saving memory is worth the time."""
    return any(tensor.nbytes >= LARGE for tensor in tensors)


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks in this process instead of returning them to the kernel.

    Activations and gradients are blocks of about 100 MB that live for milliseconds. By default, glibc maps each block
    on allocation and unmaps it on release, so the kernel zeroes every page of every temporary tensor, which takes most
    of the time of a training step on a CPU. See `mallopt(3)`. Without glibc, the function does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**28)


def release_freed_memory() -> None:
    """Return the pages of freed blocks to the kernel; the process keeps their addresses. Without glibc, do nothing.

    Takes a fifth of a second where the pages of some 500 MB are used again.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def release_libraries() -> None:
    """Give back the pages of libraries' code that was read when they were loaded; on Linux alone.

    Most of it is never used again, such as CUDA's in a run on a CPU; what is used is mapped anew. Takes 50 ms.
    """
    if SMAPS.exists():
        libc = ctypes.CDLL(None)
        for part in MAPPED_LIBRARY.finditer(SMAPS.read_text()):
            start, end = int(part["start"], 16), int(part["end"], 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Give back the pages of tensors that lie in a mapped file, until they are read again; on Linux alone.

    Nothing is lost by it, see `madvise(2)`: pages that were changed stay. Of other tensors, it would swap them out.
    """
    if platform.system() == "Linux":
        libc, page = ctypes.CDLL(None), os.sysconf("SC_PAGE_SIZE")
        for tensor in tensors:
            start = -(-tensor.data_ptr() // page) * page
            size = (tensor.data_ptr() + tensor.nbytes - start) // page * page
            if size > 0:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT)
