"""What the launcher (torchrun, deepspeed) says of this process, and whether it is still there: RANK, WORLD_SIZE and
LOCAL_RANK are read here alone. Imports no torch, so that a wrong configuration is refused before anything starts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

TORCHRUN, DEEPSPEED = "torchrun", "deepspeed"


def launched() -> bool:
    """Whether a launcher started this process; under plain `python` there is none."""
    return "RANK" in os.environ


def ranks() -> int:
    """How many ranks the launcher was asked for; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its host; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def declare(rank: int, ranks: int, local_rank: int) -> None:
    """Say what a launcher would: for a process started without one, since libraries read the same variables."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(local_rank)}


def starts_again() -> bool:
    """Whether the launcher would start this process anew if it left with an error (`torchrun --max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    )


class Launcher:
    """The process that started this one, where it is a launcher that we know: `name` is empty for any other, which may well
    end before us (a shell, nohup).

    patience: seconds between its SIGTERM and its SIGKILL, as far as it says so (torchrun's --shutdown-timeout is seen where
    it is given as TORCH_ELASTIC_SHUTDOWN_TIMEOUT); 0 without a launcher.
    """

    def __init__(self) -> None:
        self.name, self.patience = "", 0.0
        self._parent, self._above = os.getppid(), 0
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self.name, self.patience = TORCHRUN, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        elif launched() and "deepspeed.launcher.launch" in _words(self._parent):
            self.name, self.patience = DEEPSPEED, 30.0
            # `deepspeed` starts one process a host, which starts the ranks and outlives it
            if (above := _parent_of(self._parent)) is not None and DEEPSPEED in _words(above):
                self._above = above

    def alive(self) -> bool:
        """Whether it is still there; True where there was none."""
        if not self.name:
            return True
        if os.getppid() != self._parent:
            return False
        return not self._above or _parent_of(self._parent) == self._above


def _words(pid: int) -> str:
    """The command line of a process; empty where it cannot be read."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    return ""


def _parent_of(pid: int) -> int | None:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
