"""What a benchmark has measured so far: in a JSON file that is whole at every moment and that a later call goes on with, and
as Markdown tables for docs/benchmarks.md."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Results, Row, line
from lejepa_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
_SAME = ("device", "torch", "sizes")  # without these, rows are of something else
_WIDEST = 160  # characters of a cell
_WHERE = ("date", "device", "commit")  # before a colon; packages and what else there is follow


@dataclass
class Record:
    """What has been measured, here and, if there is a path, in a JSON file that is whole at every moment."""

    path: Path | None
    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    done: list[list[str]] = field(default_factory=list)  # section, case
    failed: set[tuple[str, str]] = field(default_factory=set)  # before, and not tried again yet

    @classmethod
    def opened(cls, path: Path | None, machine: dict[str, str], *, again: bool = False) -> Record:
        """With the rows of the file, if it is there and not to be begun `again`. Raises UserError where they are of another
        device, torch or size, or the file is of something else."""
        if path is None or again or not path.exists():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            return cls(path, machine)
        try:
            old = json.loads(path.read_text())
            before, rows, done = old["machine"], old["rows"], old["done"]
            before["date"], before["commit"], before["source"], [(row["section"], row["task"]) for row in rows]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} holds no results of bench.py gpu that could be gone on with: choose another --json FILE, or "
                "replace it with --again."
            ) from None
        other = [f"{key} {before.get(key)}, here {machine[key]}" for key in _SAME if before.get(key) != machine[key]]
        if other:
            raise UserError(
                f"{path} is of something else ({'; '.join(other)}): choose another --json FILE, or start over with "
                "--again."
            )
        commit, date = before["commit"], before["date"]
        if machine["date"] not in date:
            date = f"{date} and {machine['date']}"
        if before["source"] != machine["source"]:
            _say(f"{path} was measured at commit {commit}, and the code has changed since; --again starts over.")
            commit = f"{commit}, then {machine['commit']}"
        failed = {(row["section"], row["task"]) for row in rows if "failure" in row}
        kept = failed | {(section, case) for section, case in done}
        rows = [row for row in rows if (row["section"], row["task"]) in kept]
        record = cls(path, machine | {"commit": commit, "date": date}, rows, done, failed)
        counts = Counter(section for section, _ in done)
        taken = ", ".join(f"{section} {count}" for section, count in counts.items()) or "none"
        _say(f"{path}: cases taken over: {taken}. To be tried once more: {len(failed)}.")
        return record

    def is_done(self, section: str, task: str) -> bool:
        return [section, task] in self.done

    def begin(self, section: str, task: str) -> None:
        """Forget what there is of a case that is measured once more."""
        self.rows = [row for row in self.rows if (row["section"], row["task"]) != (section, task)]

    def add(self, section: str, task: str, row: Row) -> None:
        row = _plain({"section": section, "task": task, **row})
        self.rows.append(row)
        print(line({key: value for key, value in row.items() if key != "task"}), flush=True)
        self.save()

    def finish(self, section: str, task: str) -> None:
        self.done.append([section, task])
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        temporary = self.path.with_name(f"{self.path.name}.new")
        temporary.write_text(json.dumps({"machine": self.machine, "rows": self.rows, "done": self.done}, indent=1))
        temporary.replace(self.path)

    @property
    def results(self) -> Results:
        return Results(machine=self.machine, rows=self.rows)


def tables(results: Results) -> str:
    """A Markdown table of each section, in the order of its first row, below what its numbers belong to."""
    machine = results["machine"]
    rest = {k: v for k, v in machine.items() if k not in (*_WHERE, "command", "source", "sizes")}
    where = f"{machine['date']}, {machine['device']}, commit {machine['commit']}; "
    where += ", ".join(f"{name} {value}" for name, value in rest.items())
    where += f"; `{machine['command']}`:"
    sections: dict[str, list[Row]] = {}
    for row in results["rows"]:
        sections.setdefault(row["section"], []).append(row)
    return "\n".join(f"### {name}\n\n{where}\n\n{_table(rows)}\n" for name, rows in sections.items())


def _table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("section", "task")))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):  # four digits, and no exponent where people read none
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return textwrap.shorten(text, _WIDEST, placeholder=" ...").replace("|", "\\|")


def revision() -> dict[str, str]:
    """Of the code: the commit, where git is there to say it, and a digest of every file that may change a number."""
    digest = hashlib.sha256()
    for path in sorted(
        p for folder in ("lejepa_scale", "launchers", "tools", "configs") for p in (ROOT / folder).rglob("*")
    ):
        if path.suffix in (".py", ".cpp", ".yaml"):
            digest.update(path.read_bytes())
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except OSError:
        said = ""
    return {"commit": said or "unknown", "source": digest.hexdigest()[:12]}


def _plain(value: Any) -> Any:
    """As JSON gives it back; what JSON has no word for, such as NaN, becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
