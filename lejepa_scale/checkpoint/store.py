"""The checkpoints of a run directory: written aside, synced, renamed, marked complete last.

checkpoints/step_00001000/
    model*.safetensors       fp32 parameters and buffers under the module's names, one file for each rank that wrote some
    optimizer*.safetensors   AdamW's moments of the same elements, `exp_avg/NAME` and `exp_avg_sq/NAME`, or Muon's one,
                             `momentum_buffer/NAME`
    index.json               where every tensor's elements are (see saved.py)
    probe.safetensors        online probe, where there is one
    state.json               step and counters; versions, engine and ranks
    config.yaml              the resolved configuration
    COMPLETE                 JSON: bytes and CRC-32 of every file above; written last
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml

from lejepa_scale.checkpoint import places
from lejepa_scale.checkpoint.files import Written, write_text
from lejepa_scale.checkpoint.places import Place, is_local, place
from lejepa_scale.checkpoint.saved import CONFIG, MARKER, STATE, marked
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"  # in the run directory: that there was one, should the folder of checkpoints be lost
BEST = "best_checkpoint"  # likewise, with its metric
_NAME = re.compile(r"step_(\d{8,})")
_REMAINS = re.compile(r"step_\d{8,}(\.replaced)?\.partial")
_ROOM = 1.02  # of a checkpoint's bytes, for what a file system adds


class Store:
    """The checkpoints of one run directory; rank 0 alone changes anything. keep: how many of the newest stay. keep_every:
    those of steps that it divides stay for good. best: `max:METRIC` or `min:METRIC`, by which the best one stays, of the
    equal ones the newest. root: where they are kept; unset, `checkpoints` in the run directory.

    On a file system one is written aside and renamed. An object store shows a file when it is whole and renames nothing:
    there, what has no marker is what an interrupted save has left.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        keep_every: int | None = None,
        best: str | None = None,
        root: Place | None = None,
    ) -> None:
        self.run_dir, self.keep, self.keep_every = run_dir, keep, keep_every
        self.root = run_dir / "checkpoints" if root is None else root
        self._goal, _, self._metric = (best or "").partition(":")
        self._values: dict[Place, float | None] = {}

    def complete(self) -> list[Place]:
        """Complete checkpoints, oldest first."""
        return sorted((p for p in self._steps() if marked(p) is not None), key=step_of)

    def latest(self) -> Place | None:
        complete = self.complete()
        return complete[-1] if complete else None

    def _steps(self) -> list[Place]:
        """Folders that are named as ours are; `best_step_00000012` and `step_00000012.old` are somebody else's."""
        found = places.listed(self.root).items()
        return [self.root / name for name, is_folder in found if is_folder and _NAME.fullmatch(name)]

    def begin(self, step: int, nbytes: int) -> Place:
        """An empty folder for the files of a checkpoint of `nbytes` bytes. What interrupted saves have left goes, and so do
        the oldest complete ones where the disk has no room, but for the newest. Raises UserError, OSError."""
        if not isinstance(self.root, Path):
            for found in self._steps():
                if step_of(found) == step or marked(found) is None:
                    self.discard(found)
            return self.root / f"step_{step:08d}"
        self.root.mkdir(parents=True, exist_ok=True)
        for name in places.listed(self.root):
            if _REMAINS.fullmatch(name):
                places.remove(self.root / name)
        self._make_room(self.root, int(nbytes * _ROOM))
        partial = self.root / f"step_{step:08d}.partial"
        partial.mkdir()
        return partial

    def finish(self, partial: Place, files: Mapping[str, Written]) -> Place:
        """All files are written: give the folder its name, mark it complete, let older ones go. Raises UserError where a
        file is not there as its rank has written it; OSError. What fails once it is complete is told of, and no more."""
        for name, written in files.items():
            there = partial / name
            try:
                with places.reading(there):
                    found = there.stat().st_size
            except places.ABSENT:
                found = None
            if found != written.bytes:
                raise UserError(
                    f"{there} is not there as it was written: rank 0 does not see what other ranks write. run.dir must lie "
                    "on a file system that all nodes share, or checkpoint.dir name a store that they do."
                )
        target, replaced = partial, None
        if isinstance(partial, Path):
            places.sync(partial)
            target, replaced = partial.with_suffix(""), partial.with_suffix(".replaced.partial")
            if target.exists():
                places.rename(target, replaced)
            partial.rename(target)
            places.sync(self.root)
        write_text(target / MARKER, json.dumps({name: asdict(written) for name, written in files.items()}, indent=1))
        if replaced is not None:
            places.remove(replaced)
        self._values.pop(target, None)
        try:
            write_text(self.run_dir / LAST, f"{target.name}\n")
            if self.best() == target:
                write_text(self.run_dir / BEST, f"{target.name} {self._metric} {self._value(target)}\n")
                logger.info("%s is the best so far: %s = %g.", target, self._metric, self._value(target))
            for old in self._expendable():
                self.discard(old)
        except places.faults(target, UserError) as error:
            logger.warning("%s is saved; what is older stays until the next save: %s.", target, places.said(error))
        return target

    def best(self) -> Place | None:
        """The best complete one by the metric; None without one, or where none has it."""
        valued = [(value, path) for path in self.complete() if (value := self._value(path)) is not None]
        sign = -1 if self._goal == "min" else 1
        return max(valued, key=lambda found: (sign * found[0], step_of(found[1])))[1] if valued else None

    def _value(self, path: Place) -> float | None:
        """Of the metric, as a checkpoint says it. Raises UserError where it cannot be read: as one without a value, the best
        one would go."""
        if self._metric and path not in self._values:
            try:
                with places.reading(path / STATE):
                    text = (path / STATE).read_bytes()
                value = float(json.loads(text)["metrics"][self._metric])
            except (*places.ABSENT, ValueError, KeyError, TypeError):
                value = math.nan
            self._values[path] = value if math.isfinite(value) else None
        return self._values.get(path)

    def set_aside(self, damaged: Place) -> Place:
        """Rename a checkpoint that cannot be read, so that it is neither gone on from nor counted."""
        taken, number = places.listed(self.root), 1
        aside = damaged.with_name(f"{damaged.name}.damaged")
        while aside.name in taken:
            number += 1
            aside = damaged.with_name(f"{damaged.name}.damaged-{number}")
        if not is_local(damaged):
            (damaged / MARKER).unlink()  # first: a store copies file by file
        places.rename(damaged, aside)
        return aside

    def _expendable(self) -> list[Place]:
        """Complete ones that need not be kept, oldest first."""
        best = self.best()
        return [old for old in self.complete()[: -self.keep] if old != best and not self._for_good(old)]

    def _for_good(self, path: Place) -> bool:
        return self.keep_every is not None and step_of(path) % self.keep_every == 0

    def _make_room(self, root: Path, nbytes: int) -> None:
        """Remove the oldest that `keep` would keep, never the newest, nor the best, nor those kept for good."""

        def free() -> int:
            return shutil.disk_usage(root).free

        if (left := free()) >= nbytes:
            return
        best = self.best()
        for old in [path for path in self.complete()[:-1] if path != best and not self._for_good(path)]:
            logger.warning("%s is removed: the disk has no room for one more checkpoint beside it.", old)
            self.discard(old)
            if (left := free()) >= nbytes:
                return
        raise UserError(
            f"a checkpoint takes {nbytes / 1e9:.3g} GB, and the disk of {root} has {left / 1e9:.3g} GB left. Make room, or "
            "lower checkpoint.keep."
        )

    def discard(self, path: Place) -> None:
        """Remove a checkpoint, or what there is of one; its marker first, so that half a removal is never gone on from.
        Raises what the disk or the store does where the marker stays."""
        (path / MARKER).unlink(missing_ok=True)
        places.remove(path)


def step_of(path: Place) -> int:
    """The step that a checkpoint's folder is named after."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def find(named: str | Place) -> Place:
    """The checkpoint meant by a run directory (its newest complete one), by the folder or address of its checkpoints, or by
    those of one of them. Raises UserError."""
    path = place(named) if isinstance(named, str | Path) else named
    if marked(path) is not None:
        return path
    roots = [path / "checkpoints", path, *_elsewhere(path)]
    latest = next((found for root in roots if (found := Store(Path(), keep=1, root=root).latest())), None)
    if latest is None:
        raise UserError(f"{path} is neither a complete checkpoint nor a run directory that holds one.")
    return latest


def _elsewhere(run_dir: Place) -> list[Place]:
    """The checkpoint.dir of a run."""
    try:
        with places.reading(run_dir / CONFIG):
            text = (run_dir / CONFIG).read_bytes()
        named = yaml.safe_load(text)["checkpoint"]["dir"]
    except (*places.ABSENT, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return []
    return [place(str(named))] if named else []
