"""One run, one directory: a lock file that names who trains in it, and shows by its time of change that they still do; in an
object store, by its text."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lejepa_scale.checkpoint.files import write_text
from lejepa_scale.checkpoint.places import ABSENT, Place, faults, reading, said, status
from lejepa_scale.errors import UserError
from lejepa_scale.parallel import living

logger = logging.getLogger(__name__)

NAME = "lock"
BEAT_SECONDS = 15.0
WATCH_SECONDS = 45.0  # in which a lock of another machine shows a beat, if anybody holds it


@contextmanager
def locked(run_dir: Place) -> Iterator[None]:
    """Hold the lock of a directory, which is made where it is not there, and goes again where nothing came into it. Raises
    UserError where another process trains there, with who and since when, or nothing can be written. The lock of one that
    is gone is taken over, which is told of."""
    path, mine = run_dir / NAME, _myself()
    new = isinstance(run_dir, Path) and not run_dir.exists()
    try:
        if isinstance(run_dir, Path):
            run_dir.mkdir(parents=True, exist_ok=True)
        while not _taken(path, mine):
            other = _holder(path)
            if other is not None and _alive(path, other):
                raise UserError(
                    f"{run_dir} is in use by {_named(other)}. Two runs would overwrite each other's checkpoints: end that "
                    "one, or give another run.dir."
                )
            logger.warning("%s was in use by %s, which is gone: this run takes it over.", run_dir, _named(other))
            _remove(path, other)
    except UserError:
        raise
    except faults(run_dir) as error:
        raise UserError(f"{run_dir} cannot be written: {said(error)}.", status(error)) from error
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, over), daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join(BEAT_SECONDS)  # a beat that is under way would write it again
        with suppress(*faults(path)):
            _remove(path, mine)
        if new and isinstance(run_dir, Path):
            with suppress(OSError):  # it is not empty
                run_dir.rmdir()


def seen(run_dir: Path) -> tuple[str, bool] | None:
    """Who holds a directory's lock, in words, and whether they show a sign of life, without waiting for one: a beat of the
    last while, where their processes are not seen from here. None where nobody holds it. Raises UserError where the lock
    cannot be read."""
    path = run_dir / NAME
    try:
        with reading(path):
            if (other := _holder(path)) is None:
                return None
            if _ours_to_see(other):
                return _named(other), _lives(other)
            return _named(other), time.time() - path.stat().st_mtime < WATCH_SECONDS
    except ABSENT:
        return None


def _ours_to_see(other: dict[str, Any]) -> bool:
    return (other["host"], other.get("namespace")) == (socket.gethostname(), living.namespace())


def _lives(other: dict[str, Any]) -> bool:
    begun = living.begun(int(other["pid"]))
    return begun is not None and begun == other.get("begun")


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "begun": living.begun(os.getpid()),
        "namespace": living.namespace(),
    }


def _taken(path: Place, mine: dict[str, Any]) -> bool:
    """Whether the lock was free, and is ours now. It is never there without its text."""
    if not isinstance(path, Path):
        try:
            path.fs.pipe_file(path.path, json.dumps(mine).encode(), mode="create")
        except FileExistsError:
            return False
        return True
    unfinished = path.with_name(f"{NAME}.{mine['host']}.{mine['pid']}.partial")
    try:
        write_text(unfinished, json.dumps(mine))
        os.link(unfinished, path)
    except FileExistsError:
        return False
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def _holder(path: Place) -> dict[str, Any] | None:
    """Who holds it; None where it is not there, or says something else. Raises what the place does where it does not
    answer, which is no sign that nobody holds it."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and {"host", "pid", "since"} <= found.keys():
            return {key: value for key, value in found.items() if key != "beat"}
    return None


def _alive(path: Place, other: dict[str, Any]) -> bool:
    if _ours_to_see(other):
        return _lives(other)
    logger.info("waiting for a sign of life of %s, up to %.0f s.", _named(other), WATCH_SECONDS)
    marks: set[int | bytes] = set()
    begun = since = time.monotonic()
    while time.monotonic() < since + WATCH_SECONDS:
        try:
            marks.add(path.stat().st_mtime_ns if isinstance(path, Path) else path.read_bytes())
        except FileNotFoundError:
            return False  # it has just let go
        except faults(path):  # in which time the other could not beat either
            since = time.monotonic()
            if since > begun + 4 * WATCH_SECONDS:
                raise
        if len(marks) > 1:
            return True
        time.sleep(min(1.0, WATCH_SECONDS / 10))
    return False


def _beat(path: Place, mine: dict[str, Any], over: threading.Event) -> None:
    number = 0
    while not over.wait(BEAT_SECONDS):
        with suppress(*faults(path)):
            if _holder(path) == mine:
                number += 1
                if isinstance(path, Path):
                    os.utime(path)
                else:
                    path.write_bytes(json.dumps({**mine, "beat": number}).encode())


def _remove(path: Place, whose: dict[str, Any] | None) -> None:
    """Unless another has it by now. Raises what the place does: one that cannot be taken over would be tried for ever."""
    if _holder(path) == whose:
        path.unlink(missing_ok=True)


def _named(other: dict[str, Any] | None) -> str:
    if other is None:
        return "somebody whose lock does not name them"
    return f"process {other['pid']} on {other['host']}, since {other['since']}"
