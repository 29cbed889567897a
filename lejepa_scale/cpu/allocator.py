"""How a process that trains on a CPU keeps its memory. Every step frees and takes the same large tensors: given back to the
system in between, they come back as pages to be zeroed and mapped one by one, a seventh of a small network's step."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGE = 1 << 30


def keep_memory() -> None:
    """Freed memory stays with the process, and large tensors lie in large pages, where the system offers either (glibc,
    Linux). Call before the first tensor; does nothing where there is a GPU."""
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _LARGE)
