"""Progress of long work, on stderr: seldom in a log, where every state of a bar is kept, and none of work that is short.
Refuses to say what was done: words do."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_TERMINAL, _LOG = 0.5, 15.0  # seconds between two states of a bar
_DELAY = 1.0  # seconds before the first


def bar(name: str, work: Iterable[T], *, unit: str, total: int | None = None, shown: bool = True) -> Iterable[T]:
    """What `work` yields, under a bar. total: units, where `work` has no length. shown: False on ranks whose progress the
    first one tells."""
    return tqdm(work, name, total, leave=False, unit=unit, disable=not shown, delay=_DELAY, **_style())


def counter(
    name: str, *, unit: str, total: int | None = None, done: int = 0, scaled: bool = False, kept: bool = False
) -> tqdm:  # type: ignore[type-arg]  # which has arguments for type checkers alone
    """A bar that the caller updates. total: units, if they are known. done: units of an earlier process. scaled: by
    thousands, as kB. kept: there at once, and left at the end, with the rate of the last minutes."""
    how = {"delay": 0.0 if kept else _DELAY, "smoothing": 0.05 if kept else 0.3} | _style()
    return tqdm(None, name, total, kept, initial=done, unit=unit, unit_scale=scaled, **how)


def _style() -> dict[str, Any]:
    return {"mininterval": _TERMINAL if sys.stderr.isatty() else _LOG, "dynamic_ncols": True}
