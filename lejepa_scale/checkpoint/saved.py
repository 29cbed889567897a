"""A checkpoint on disk, read in pieces of any size: whoever reads holds its own part and no more. Old ones, whose tensors
are whole in one file, are read alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lejepa_scale.checkpoint.files import checksum
from lejepa_scale.checkpoint.layout import Layout, Part, boxes, key
from lejepa_scale.checkpoint.places import ABSENT, Place, faults, reading, said, status
from lejepa_scale.checkpoint.tensors import TensorFile
from lejepa_scale.engine.base import AVERAGE, KINDS_OF_MOMENTS, MOMENTS, MOMENTUM, VALUE
from lejepa_scale.errors import UserError

Weights = Literal["best", "trained", "average", "first"]  # of a run: `best` is the average where one is kept
_OPEN_FILES = 8  # at once
_OF_THE_FILE = (
    *ABSENT,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    SafetensorError,
)  # no other try will do better
MARKER, INDEX, STATE, CONFIG, PROBE = "COMPLETE", "index.json", "state.json", "config.yaml", "probe.safetensors"


@dataclass
class Progress:
    """Where a run stands: `step` optimizer steps are done. With the configuration this determines all that follows."""

    step: int
    data_fingerprint: str
    updates: int = 0
    averaged: int = 0  # updates of the averaged weights; 0: there are none
    nonfinite: int = 0
    skipped_images: int = 0
    seconds: float = 0.0
    epoch: int = 0  # samples of an epoch, by which words of the configuration are steps; 0: not known
    durations: dict[str, int] = field(default_factory=dict)  # those of the configuration, in steps


def file_of(kind: str, rank: int, ranks: int) -> str:
    """The file that holds what a rank has written of the weights, their average, or the moments."""
    stem = {VALUE: "model", AVERAGE: AVERAGE}.get(kind, "optimizer")
    return f"{stem}.safetensors" if ranks == 1 else f"{stem}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def title(kind: str, name: str) -> str:
    """A tensor's name in its file."""
    return name if kind in (VALUE, AVERAGE) else f"{kind}/{name}"


def index_text(
    layout: Layout, buffers: Mapping[str, tuple[int, ...]], kinds: Sequence[str], muons: Iterable[str] = ()
) -> str:
    """index.json: where every tensor's elements are. parts: [rank, first element, number of elements]; a rank's file is
    `file_of` it, the keys in it are `layout.key` of `layout.boxes`, after `title`. muons: parameters with Muon's moment."""
    tensors = {
        name: {"shape": layout.shapes[name], "parts": [[p.rank, p.start, p.length] for p in parts]}
        for name, parts in layout.parts.items()
    }
    whole = {name: {"shape": shape, "parts": [[0, 0, prod(shape)]]} for name, shape in buffers.items()}
    found = {"ranks": layout.ranks, "kinds": list(kinds), "parameters": tensors, "buffers": whole}
    return json.dumps({**found, "muons": names} if (names := sorted(muons)) else found)


class Saved:
    """A complete checkpoint. Raises UserError, naming the file, for what is none, or cannot be read."""

    def __init__(self, path: Place) -> None:
        self.path = path
        self.files = marked(path)
        if self.files is None:
            raise UserError(
                f"{path} is not a complete checkpoint: {path / MARKER} is missing, or says nothing of files."
            )
        self._open: dict[str, TensorFile] = {}
        state = self._json(STATE)
        known = {one.name for one in fields(Progress)}
        try:
            self.progress = Progress(**{name: value for name, value in state.items() if name in known})
        except TypeError as error:
            raise UserError(f"{path / STATE} cannot be read: {error}. {advice(path)}") from error
        index = self._json(INDEX) if INDEX in self.files else self._index_of_whole_files()
        try:
            self.ranks = int(index["ranks"])
            self.averaged = AVERAGE in index["kinds"]
            self.parameters, self.buffers = (_parts(index[group], self.ranks) for group in ("parameters", "buffers"))
            kinds, muons = set(index["kinds"]), set(index.get("muons", ()))
            sound = kinds >= {*MOMENTS, *([MOMENTUM] if muons else [])}
            self.moments: dict[str, tuple[str, ...]] = {  # of every parameter; empty: there are none
                name: (MOMENTUM,) if name in muons else MOMENTS for name in self.parameters if sound
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._unreadable(INDEX, error) from error

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of parameters and buffers."""
        return {name: shape for name, (shape, _) in (self.parameters | self.buffers).items()}

    def shapes_of(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Of the tensors of one kind: buffers have values and averages, and no moments; a parameter has those of its
        optimizer."""
        if kind not in KINDS_OF_MOMENTS:
            return self.shapes
        return {name: self.shapes[name] for name, kinds in self.moments.items() if kind in kinds}

    def kind_of(self, weights: Weights) -> str:
        """Which set of weights is meant. Raises UserError where the average is, and there is none."""
        if weights == "average" and not self.averaged:
            raise UserError(
                f"{self.path} holds no averaged weights: a run keeps them with average.kind=ema or swa, from the step that "
                "average.start says."
            )
        return AVERAGE if self.averaged and weights != "trained" else VALUE

    def config_text(self) -> str:
        return self._read(CONFIG)

    def probe(self) -> dict[str, Tensor]:
        """The online probe's state; empty where there was none."""
        if PROBE not in (self.files or {}):
            return {}
        try:
            return load((self.path / PROBE).read_bytes())
        except faults(self.path, SafetensorError) as error:
            raise self._unreadable(PROBE, error) from error

    def read(self, name: str, kind: str = VALUE, start: int = 0, length: int | None = None) -> Tensor:
        """Elements start .. start + length - 1 of the flattened tensor; all without `length`. Takes their memory, twice."""
        shape, parts = (self.parameters | self.buffers)[name]
        stop = prod(shape) if length is None else start + length
        out: Tensor | None = None
        for part in parts:
            begin = part.start
            for box in boxes(shape, part.start, part.length):
                count = prod(side.stop - side.start for side in box)
                first, last = max(start, begin), min(stop, begin + count)
                if first < last:
                    file = file_of(kind, part.rank, self.ranks)
                    found = self._elements(file, key(title(kind, name), shape, box), first - begin, last - begin)
                    out = torch.empty(stop - start, dtype=found.dtype) if out is None else out
                    out[first - start : last - start] = found
                begin += count
        return torch.empty(0) if out is None else out

    def whole(self, name: str, kind: str = VALUE) -> Tensor:
        """A tensor in its shape. Buffers have an average too."""
        return self.read(name, kind).view(self.shapes[name])

    def dtype(self, name: str, kind: str = VALUE) -> torch.dtype:
        """Of a tensor, as it is stored."""
        shape, parts = (self.parameters | self.buffers)[name]
        part = parts[0]
        box = boxes(shape, part.start, part.length)[0] if part.length else ()
        file = file_of(kind, part.rank, self.ranks)
        try:
            return self._opened(file).dtype(key(title(kind, name), shape, box))
        except faults(self.path, KeyError, ValueError) as error:
            raise self._unreadable(file, error) from error

    def _elements(self, file: str, key: str, first: int, last: int) -> Tensor:
        """Of a contiguous rectangle."""
        try:
            return self._opened(file).elements(key, first, last)
        except faults(self.path, KeyError, ValueError) as error:
            raise self._unreadable(file, error) from error

    def _opened(self, file: str) -> TensorFile:
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[file] = TensorFile(self.path / file)
        return self._open[file]

    def _index_of_whole_files(self) -> dict[str, Any]:
        """Of a checkpoint from before there was one."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in ("model.safetensors", "optimizer.safetensors"):
            try:
                file = self._opened(name)
                shapes[name] = {key: file.shape(key) for key in file.keys()}
            except faults(self.path, ValueError) as error:
                raise self._unreadable(name, error) from error
        model, moments = shapes.values()
        kinds = sorted({key.partition("/")[0] for key in moments})
        if kinds and kinds != sorted(MOMENTS):
            raise UserError(f"checkpoint {self.path} holds moments {kinds}, expected {list(MOMENTS)}.")
        whole = {name: {"shape": shape, "parts": [[0, 0, prod(shape)]]} for name, shape in model.items()}
        return {"ranks": 1, "kinds": [VALUE, *kinds], "parameters": whole, "buffers": {}}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self._read(name))
        except ValueError as error:
            raise self._unreadable(name, error) from error
        return dict(found)

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except faults(self.path, ValueError) as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> UserError:
        text = f"checkpoint file {self.path / name} cannot be read: {said(error)}."
        if isinstance(error, _OF_THE_FILE):
            return UserError(f"{text} {advice(self.path)}")
        return UserError(text, status(error))


def marked(path: Place) -> dict[str, dict[str, int]] | None:
    """The files that a completion marker promises; None where there is no marker, or it is not one of ours. Raises UserError
    where it cannot be read."""
    try:
        with reading(path / MARKER):
            text = (path / MARKER).read_bytes()
        found = json.loads(text)
    except (*ABSENT, ValueError):
        return None
    if not isinstance(found, dict) or STATE not in found:
        return None
    sound = all(isinstance(row, dict) and {"bytes", "crc32"} <= row.keys() for row in found.values())
    return found if sound else None


def verify(path: Place, *, moments: bool = True) -> None:
    """Compare every file of a checkpoint with its completion marker; without `moments`, which are two thirds of it, all but
    theirs. Raises UserError naming the first that differs, or that cannot be read."""
    if found := damage(path, moments=moments):
        raise UserError(found)


def damage(path: Place, share: int = 0, of: int = 1, *, moments: bool = True) -> str | None:
    """What is wrong with a checkpoint, or with a share of its files: the first that is not as its completion marker says.
    None where there is nothing. Raises UserError where one cannot be read, which is no damage: the next time it may be."""
    files = marked(path)
    if files is None:
        return f"{path} is not a complete checkpoint: {path / MARKER} is missing, or says nothing of files."
    for number, (name, expected) in enumerate(sorted(files.items())):
        if number % of != share or (name.startswith("optimizer") and not moments):
            continue
        file = path / name
        try:
            with reading(file):
                same = file.stat().st_size == expected["bytes"] and checksum(file) == expected["crc32"]
        except ABSENT:
            return f"checkpoint file {file} is missing. {advice(path)}"
        if not same:
            return f"checkpoint file {file} is corrupt: its checksum differs from {MARKER}. {advice(path)}"
    return None


def advice(path: Place) -> str:
    return f"Restore it, or delete {path} to go on from the checkpoint before."


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Names the first tensor that holds something else than numbers; None where all are finite. By the least and the
    largest, which NaN is where there is one: a fortieth of the time that asking every element takes."""
    for name, tensor in tensors:
        if tensor.numel() and tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            finite = tensor.isfinite()
            return f"{int((~finite).sum())} of {tensor.numel()} values of {name} are not finite"
    return None


def _parts(tensors: dict[str, Any], ranks: int) -> dict[str, tuple[tuple[int, ...], tuple[Part, ...]]]:
    """Raises ValueError where parts do not tile their tensor: elements that nobody wrote would be read as they lie in
    memory."""
    out = {}
    for name, found in tensors.items():
        shape, parts = tuple(map(int, found["shape"])), tuple(Part(*map(int, part)) for part in found["parts"])
        ends = [0, *(part.start + part.length for part in parts)]
        tiled = ends[-1] == prod(shape) and all(a == part.start for a, part in zip(ends, parts, strict=False))
        if not tiled or not all(0 <= part.rank < ranks and part.length > 0 for part in parts if prod(shape)):
            raise ValueError(f"its parts of {name} are not all of it, once")
        out[name] = (shape, parts)
    return out


def state_text(progress: Progress, **further: object) -> str:
    """state.json: the counters, and what a reader may want to know of the run that wrote it."""
    return json.dumps({**asdict(progress), **further}, indent=1)
