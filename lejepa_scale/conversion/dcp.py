"""torch.distributed.checkpoint's format, as `torch.distributed.checkpoint.save` writes {"model": ..., "optim": ...} of
`get_state_dict`, and `load` reads it at any number of ranks. Written tensor by tensor. Read without running what its pickled
`.metadata` names: only the classes that describe tensors are made of it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as described

from lejepa_scale.conversion.model import Lazy
from lejepa_scale.conversion.training import Counters, TrainingState, rebuilt, texts_beside, texts_of
from lejepa_scale.engine.base import AVERAGE, KINDS_OF_MOMENTS, MOMENTS, VALUE
from lejepa_scale.errors import UserError

METADATA, _DATA, _STEP = ".metadata", "__0_0.distcp", "step"
_CLASSES: dict[tuple[str, str], Any] = {
    (described.__name__, name): getattr(described, name)
    for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),  # where it was written
    ("pathlib._local", "PosixPath"): lambda *parts: "/".join(parts),
}  # fmt: skip


def path_of(kind: str, name: str) -> tuple[str, ...]:
    """Where a tensor lies in the nested dictionaries that get_state_dict gives; averages lie beside them."""
    if kind in KINDS_OF_MOMENTS:
        return "optim", "state", name, kind
    return ("model" if kind == VALUE else AVERAGE), name


def write(state: TrainingState, folder: Path, told: Callable[[int], object]) -> int:
    """Number of tensors."""
    folder.mkdir()
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    paths: dict[str, tuple[str, ...]] = {}
    with (folder / _DATA).open("wb") as file:

        def add(path: tuple[str, ...], tensor: Tensor) -> None:
            key, begin = ".".join(path), file.tell()
            torch.save(tensor, file)
            zeros = torch.Size([0] * tensor.dim())
            tensors[key] = described.TensorStorageMetadata(
                described.TensorProperties(dtype=tensor.dtype),
                tensor.size(),
                [described.ChunkStorageMetadata(zeros, tensor.size())],
            )
            index = described.MetadataIndex(key, zeros, 0)
            places[index] = filesystem._StorageInfo(_DATA, begin, file.tell() - begin)
            paths[key] = path

        for kind, name, lazy in state.each():
            tensor = lazy.read()
            told(tensor.nbytes)
            add(path_of(kind, name), tensor)
            if kind == MOMENTS[0]:
                add(("optim", "state", name, "step"), torch.tensor(float(state.progress.updates)))
    about = described.Metadata(tensors, paths, places)
    (folder / METADATA).write_bytes(pickle.dumps(about))
    for name, text in texts_beside(state).items():
        (folder / name).write_text(text)
    return len(tensors)


def read(folder: Path, config: Path | None = None) -> TrainingState:
    """config: that of the run, where there is none beside it. Raises UserError where it cannot be read, or would run
    something."""
    about = _described(folder / METADATA)
    places: dict[str, list[tuple[Any, Any]]] = {}
    try:
        for index, info in about.storage_data.items():
            places.setdefault(str(index.fqn), []).append((index, info))
        tensors: dict[str, dict[str, Lazy]] = {}
        updates = 0
        for key, row in about.state_dict_metadata.items():
            if (found := _meant(str(key))) is not None and isinstance(row, described.TensorStorageMetadata):
                kind, name = found
                shape, dtype = tuple(map(int, row.size)), row.properties.dtype
                assert isinstance(dtype, torch.dtype)
                assert min(shape, default=0) >= 0
                chunks = _chunks(folder, str(key), row, places.get(str(key), []))
                read_it = _joined(folder, shape, dtype, chunks)
                if kind == _STEP:
                    updates = updates or int(read_it())
                else:
                    tensors.setdefault(kind, {})[name] = Lazy(shape, dtype, read_it)
    except (AttributeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{folder / METADATA} does not describe a checkpoint: {error!r}.") from error
    ordered = {kind: tensors[kind] for kind in (VALUE, *KINDS_OF_MOMENTS, AVERAGE) if kind in tensors}
    return rebuilt(str(folder), ordered, texts_of(folder, config, Counters(updates, updates)))


def _meant(key: str) -> tuple[str, str] | None:
    """Kind and name of a flattened key."""
    first, _, rest = key.partition(".")
    if first in ("model", AVERAGE):
        return VALUE if first == "model" else AVERAGE, rest
    name, _, kind = rest.removeprefix("state.").rpartition(".")
    return (kind, name) if first in ("optim", "optimizer") and kind in (*KINDS_OF_MOMENTS, _STEP) else None


_Chunk = tuple[tuple[int, ...], tuple[int, ...], str, int, int]  # offsets, sizes; file, first byte, bytes


def _chunks(folder: Path, key: str, row: Any, places: list[tuple[Any, Any]]) -> list[_Chunk]:
    """What a tensor is put together of; its bytes must be there, and the chunks must fill it."""
    infos = {tuple(map(int, index.offset or ())): info for index, info in places}
    chunks, filled = list[_Chunk](), 0
    for chunk in row.chunks:
        offsets, sizes = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
        info = infos.get(offsets)
        if info is None:
            raise UserError(f"{folder}: a part of {key} is nowhere.")
        name, begin, length = str(info.relative_path), int(info.offset), int(info.length)
        path = folder / name
        if Path(name).name != name or not path.is_file() or not 0 <= begin <= begin + length <= path.stat().st_size:
            raise UserError(f"{folder}: {name}, which holds a part of {key}, is not there or too short.")
        filled += torch.Size(sizes).numel()
        chunks.append((offsets, sizes, name, begin, length))
    if filled != torch.Size(tuple(map(int, row.size))).numel():
        raise UserError(f"{folder}: the parts of {key} do not fill it.")
    return chunks


def _joined(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, chunks: list[_Chunk]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        out: Tensor | None = None
        for offsets, sizes, name, begin, length in chunks:
            with (folder / name).open("rb") as file:
                file.seek(begin)
                data = io.BytesIO(file.read(length))
            try:
                part = torch.load(data, weights_only=True, map_location="cpu")
            except Exception as error:  # of zip files, of pickle, of torch
                raise UserError(
                    f"{folder / name}: what lies at {begin} cannot be read: {str(error).splitlines()[0]}"
                ) from error
            if not isinstance(part, Tensor) or tuple(part.shape) != sizes or part.dtype != dtype:
                raise UserError(f"{folder / name}: what lies at {begin} is not the tensor that is described.")
            if sizes == shape:
                return part
            out = torch.empty(shape, dtype=dtype) if out is None else out
            out[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = part
        return torch.empty(shape, dtype=dtype) if out is None else out

    return read


class _Names(Exception):
    """Something else than a description."""


class _Described(pickle.Unpickler):
    """Makes nothing but descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise _Names(f"it names {module}.{name}")


def _described(path: Path) -> Any:
    try:
        return _Described(io.BytesIO(path.read_bytes())).load()
    except _Names as error:
        raise UserError(
            f"reading {path} would run code: {error}, which no description of tensors needs. It is not read."
        ) from error
    except Exception as error:  # EOFError, KeyError, ...: whatever bytes make of an unpickler
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error


def is_one(folder: Path) -> bool:
    return (folder / METADATA).is_file()
