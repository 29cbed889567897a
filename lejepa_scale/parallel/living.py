"""Which process is which, and whether one that can be seen from here is still there: by its number, when it began, and the
namespace in which both are true. Containers of one host name may not see one another's processes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """As another process may look it up."""

    pid: int
    begun: (
        str | None
    )  # in the kernel's ticks, which tell it from another of the same number; empty where they are unknown
    namespace: str

    def gone(self) -> bool:
        """Whether it has ended; False where it cannot be seen from here."""
        return self.namespace == namespace() and begun(self.pid) != self.begun


def myself() -> Process:
    return Process(os.getpid(), begun(os.getpid()), namespace())


def begun(pid: int) -> str | None:
    """When a process began; None where there is none, or but what is left of one until its parent looks."""
    if not Path("/proc/self/stat").exists():  # no Linux
        with suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return None
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def namespace() -> str:
    """Which processes are seen from here; empty where that is unknown."""
    try:
        return os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
