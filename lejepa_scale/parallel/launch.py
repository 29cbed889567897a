"""What the launcher (torchrun, deepspeed) says of this process: RANK, WORLD_SIZE and LOCAL_RANK are read here alone. Imports
no torch, so that a wrong configuration is refused before anything starts."""

from __future__ import annotations

import os


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
