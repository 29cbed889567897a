"""What can be wrong with one sample, and the list of those that were: a run goes on without them, and says so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


def printable(text: str) -> str:
    """A name as it may be shown: control characters, which a terminal would obey, and bytes that are no text are escaped."""
    shown = str(text)  # of an address: without its secrets
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode()


class SampleFault(Exception):
    """One sample cannot be used; the message is the reason. The shard's other samples may be sound."""


@dataclass(frozen=True)
class Fault:
    """A sample that was replaced by the next good one of its shard."""

    shard: str
    key: str
    offset: int  # of its bytes in the shard
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.shard)}, sample {printable(self.key)} at byte {self.offset}: {self.reason}"


def append_to_quarantine(path: Path, faults: Iterable[Fault], step: int) -> None:
    """Append one JSON object per fault: step, shard, key, offset, reason."""
    with path.open("a") as file:
        file.writelines(
            json.dumps({"step": step, **asdict(fault), "shard": str(fault.shard)}) + "\n" for fault in faults
        )
