"""The log of which sample came at which position, by the run that consumed it or by arithmetic alone: one format for both.

A run with `data.log_keys` keeps RUN/keys/rank00000.tsv, rank00001.tsv, ...: one file a rank, so nothing is gathered over the
network. A line starting with # opens each start of the run and holds, as JSON, what determines the order; after it comes one
line a sample, tab-separated:

    step  position  source  epoch  shard  member  name  [replacement]

`position` counts samples of the global stream, over all ranks; `step` is position // global_batch, from 0. (source, shard,
member) is the sample: numbers in the order of data.shards, so that equal keys in two shards, or equal shard names in two
folders, stay apart. `name` is shard file/key for the reader. `replacement`, where there is one, is the key that came.

Lines are appended when the trainer takes the micro-batch, straight to the kernel, and so survive SIGKILL. A restarted run
takes the steps since its checkpoint again and logs them again: the two records of a position must agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lejepa_scale.data.faults import printable
from lejepa_scale.errors import UserError

Header = dict[str, Any]
_HEADER = {"fingerprint", "seed", "shuffle_block", "global_batch", "samples", "decoded"}
_LARGEST = 1 << 63


class Record(NamedTuple):
    """One sample at one position."""

    position: int
    source: int
    epoch: int
    shard: int
    member: int
    name: str
    replacement: str = ""

    @property
    def said(self) -> str:
        """For people."""
        return f"{self.name}, replaced by {self.replacement}" if self.replacement else self.name

    @property
    def sample(self) -> tuple[int, int, int]:
        """(source, shard, member): the same in every epoch."""
        return self.source, self.shard, self.member

    def __str__(self) -> str:
        came = f", replaced by {printable(self.replacement)}" if self.replacement else ""
        return f"{self.source}:{self.shard}:{self.member} {printable(self.name)} (epoch {self.epoch}){came}"


def header_line(header: Header) -> str:
    """A header as a line of a log."""
    return f"# {json.dumps(header)}\n"


def record_line(step: int, record: Record) -> str:
    """What came at a position, as a line of a log."""
    *numbers, name, replacement = record
    names = [printable(text) for text in (name, replacement) if text]
    return "\t".join([str(step), *map(str, numbers), *names]) + "\n"


class KeyLog:
    """One rank's file, opened for appending; a line that a kill left half written is cut off first."""

    def __init__(self, run_dir: Path, rank: int, header: Header) -> None:
        path = run_dir / "keys" / f"rank{rank:05d}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        _cut_torn_line(path)
        self._append(header_line(header))

    def write(self, step: int, records: Iterable[Record]) -> None:
        """Append what the trainer took in a step."""
        self._append("".join(record_line(step, record) for record in records))

    def _append(self, text: str) -> None:
        data = memoryview(text.encode())
        while data:
            data = data[self._file.write(data) :]


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 4096)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def files_of(path: Path) -> list[Path]:
    """The files of a log: itself, or those of a run directory or of its keys folder. Raises UserError."""
    if path.is_file():
        return [path]
    found = sorted(path.glob("keys/rank*.tsv")) or sorted(path.glob("rank*.tsv"))
    if not found:
        raise UserError(
            f"{path} holds no key log. Give a run directory that was trained with data.log_keys=true, or a file that "
            "`lejepa order` printed."
        )
    return found


def entries(path: Path) -> Iterator[tuple[int, Header | tuple[int, Record]]]:
    """(line number, header or (step, record)) of one file. Half a line at its end, which a kill leaves, is passed over.

    Raises UserError, with the line's number, for anything else that is not a log.
    """
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield number, _parse_header(line[1:]) if line.startswith("#") else _parse(line[:-1])
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is not a line of a key log: {line[:80]!r}.") from error


def _parse_header(text: str) -> Header:
    header = json.loads(text)
    if not isinstance(header, dict) or not header.keys() >= _HEADER:
        raise ValueError(f"a header holds {', '.join(sorted(_HEADER))}")
    counts = [header["global_batch"], *header["samples"]] if isinstance(header["samples"], list) else []
    if not counts or any(type(count) is not int or not 0 < count < _LARGEST for count in counts):
        raise ValueError("samples are a list of counts, and global_batch is one")
    return header


def _parse(line: str) -> tuple[int, Record]:
    fields = line.split("\t")
    if len(fields) not in (7, 8):
        raise ValueError(f"{len(fields)} fields")
    if not all(field.isascii() and field.isdigit() and len(field) < 20 for field in fields[:6]):
        raise ValueError("six whole numbers come first")
    step, position, source, epoch, shard, member = map(int, fields[:6])
    return step, Record(position, source, epoch, shard, member, *fields[6:])
