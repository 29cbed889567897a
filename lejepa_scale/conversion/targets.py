"""From a source to a target: written aside and renamed, one tensor in memory at a time where both sides allow it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lejepa_scale.checkpoint import find
from lejepa_scale.checkpoint.files import Entry, write_safetensors
from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.config import load_config
from lejepa_scale.conversion import dcp, native, onnx, timm_folder, zero, zero_native
from lejepa_scale.conversion.card import card
from lejepa_scale.conversion.model import DTYPES, Dtype, Lazy, Model, finite
from lejepa_scale.conversion.source import is_encoder, open_model
from lejepa_scale.conversion.training import TrainingState, expect_model, of_checkpoint, of_encoder, write_checkpoint
from lejepa_scale.conversion.verify import compare
from lejepa_scale.errors import UserError
from lejepa_scale.progress import counter

TARGETS = ("timm", "hf", "safetensors", "onnx")  # of an encoder
_OURS = re.compile(
    r"config\.(json|yaml)|preprocessor_config\.json|README\.md|state\.json|\.metadata|\S+\.distcp"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|global_step\d+_universal|latest_universal"
)
STATES = ("dcp", "zero", "lejepa")  # of a whole training state


@dataclass(frozen=True)
class Converted:
    """What was written. exact: at every size that the encoder takes, else at the native one alone."""

    path: Path
    files: tuple[Path, ...]
    tensors: int
    bytes: int
    exact: bool


def convert(
    model: Model,
    target: Path,
    kind: str = "timm",
    *,
    dtype: Dtype = "fp32",
    heads: bool = False,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    scores: list[dict[str, Any]] | None = None,
) -> Converted:
    """Write `model` as one of TARGETS. heads: the projector too (safetensors). max_shard_bytes: of tensors in one file
    (safetensors, hf), which makes several with an index of more. overwrite: what is at `target`, once the new one is whole.
    scores: of the run, for the model card. Raises UserError for what the target cannot hold, or cannot be written."""
    _expect_options(kind, heads=heads, max_shard_bytes=max_shard_bytes)
    _expect_replaceable(target, overwrite)
    if heads and not model.heads:
        raise UserError(f"{model.where} has no projector.")
    with _aside(target) as partial, _bar(model.tensors.values()) as told:
        written = _WRITERS[kind](model, partial, _Options(DTYPES[dtype], heads, max_shard_bytes, scores or [], told))
    files = (target, target.with_name(f"{target.name}.data")) if target.is_file() else sorted(target.iterdir())
    there = tuple(file for file in files if file.is_file())
    return Converted(target, there, written.tensors, sum(file.stat().st_size for file in there), written.exact)


def open_state(named: str | Place, config: Path | None = None) -> TrainingState:
    """The training state that `named` means: a run or checkpoint of ours, a folder of torch.distributed.checkpoint, a
    universal checkpoint of DeepSpeed or what its `save_checkpoint` wrote, with state.json and config.yaml of a run beside
    it; or an encoder, as the beginning of a run. config: that of a run whose state another trainer wrote by itself, without
    these, or that begins with the encoder. Raises UserError."""
    path = place(named) if isinstance(named, str) else named
    if is_encoder(path):
        if config is None:
            raise UserError(
                f"{path} is an encoder alone: name the configuration of a run with --config, whose other weights begin as "
                "its seed draws them."
            )
        return of_encoder(open_model(path), load_config(config, []))
    for form in (dcp, zero):
        if isinstance(path, Path) and form.is_one(path):
            return form.read(path, config)
    if isinstance(path, Path) and path.is_dir() and zero_native.folder_of(path) is not None:
        return zero_native.read(path, config)
    return of_checkpoint(find(path))


def convert_state(state: TrainingState, target: Path, kind: str, *, overwrite: bool = False) -> Converted:
    """Write a training state as one of STATES: `dcp`, a folder of torch.distributed.checkpoint, `zero`, DeepSpeed's
    universal checkpoint, or `lejepa`, a run directory of ours, from which a run goes on. Raises UserError."""
    _expect_replaceable(target, overwrite)
    if kind == "lejepa":
        expect_model(state)
    with _aside(target) as partial, _bar(lazy for _, _, lazy in state.each()) as told:
        count = {"dcp": dcp.write, "zero": zero.write, "lejepa": write_checkpoint}[kind](state, partial, told)
    files = tuple(file for file in sorted(target.rglob("*")) if file.is_file())
    return Converted(target, files, count, sum(file.stat().st_size for file in files), exact=True)


@dataclass(frozen=True)
class _Options:
    dtype: torch.dtype
    heads: bool
    max_shard_bytes: int | None
    scores: list[dict[str, Any]]
    told: Callable[[int], object]


@dataclass(frozen=True)
class _Written:
    tensors: int
    exact: bool = True


def _expect_options(kind: str, *, heads: bool, max_shard_bytes: int | None) -> None:
    if heads and kind != "safetensors":
        raise UserError(f"--heads is for --to safetensors: what --to {kind} is loaded by has no place for a projector.")
    if max_shard_bytes is not None and kind not in ("safetensors", "hf"):
        why = "timm reads one file of a folder" if kind == "timm" else "it is one graph"
        raise UserError(f"--max-shard-size is for --to safetensors and hf, not {kind}: {why}.")


def _expect_replaceable(target: Path, overwrite: bool) -> None:
    """A folder is replaced only where all that it holds may be of a conversion: not a run, nor a home."""
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} is there already: name another target, or give --overwrite.")
    others = [path.name for path in target.iterdir() if not _OURS.fullmatch(path.name)] if target.is_dir() else []
    if others:
        raise UserError(
            f"{target} holds {', '.join(sorted(others)[:4])}, which no conversion writes: it is not replaced. Name another "
            "target."
        )


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Where the target is made: under its name in a folder beside its place, to which it is moved at the end; nothing is
    left where that fails."""
    folder = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        yield folder / target.name
        for made in sorted(folder.iterdir()):
            place = target.with_name(made.name)
            if place.is_dir():
                place.rename(folder / f"{made.name}.replaced")
            made.replace(place)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _bar(tensors: Iterable[Lazy]) -> Iterator[Callable[[int], object]]:
    """Bytes read so far, of those of the source."""
    total = sum(map(_nbytes, tensors))
    with counter("converting", unit="B", total=total, scaled=True) as progress:
        yield progress.update


def _nbytes(lazy: Lazy) -> int:
    return Entry("", lazy.shape, lazy.dtype, lazy.read).bytes


# -- targets


def _write_timm(model: Model, folder: Path, options: _Options) -> _Written:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(timm_folder.config(model), indent=1))
    about = timm_folder.metadata(model)
    write_safetensors(folder / "model.safetensors", _entries(model.tensors, options), about)
    loads, size = ["timm", "transformers"], model.inputs.image_size
    sizes = f"exact at {size} px and at every other that timm's model takes."
    if not model.exact:
        sizes = (
            f"equal to their source at {size} px alone. At others timm interpolates the table of positions with "
            "antialiasing, and the class of transformers that they come from does it without."
        )
    if model.arguments.get("num_classes"):
        loads = ["timm"]
        sizes += " transformers' AutoModel leaves out the layer behind the pooling, whose output are the features here."
    text = card(model, loads=loads, library="timm", sizes=sizes, scores=options.scores)
    (folder / "README.md").write_text(text)
    return _Written(len(model.tensors), model.exact)


def _write_hf(model: Model, folder: Path, options: _Options) -> _Written:
    found, tensors = native.native(model)
    folder.mkdir()
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    config = {"architectures": [found.name], "torch_dtype": names[options.dtype], **found.config}
    size = model.inputs.image_size
    exact = found.exact == model.exact  # what comes out of such a class interpolates as it does
    if exact:
        sizes = f"exact at {size} px and at every other multiple of the patch size."
    else:
        sizes = (
            f"exact at {size} px alone. At others {found.name} interpolates the table of positions without antialiasing, "
            "and the training did it with: patch tokens differ by 1e-3 or so of the largest. `lejepa convert --to timm` "
            "is exact at every size."
        )
    config["lejepa_scale"] = {"exact_at": "every size" if exact else [size, size], "run": model.facts}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(native.preprocessor(model), indent=1))
    _write_shards(folder, _entries(tensors, options), options.max_shard_bytes, {"format": "pt"})
    loads = ["transformers" if found.pools else "transformers of ViTModel"]
    text = card(model, loads=loads, library="transformers", sizes=sizes, scores=options.scores)
    (folder / "README.md").write_text(text)
    return _Written(len(tensors), exact)


def _write_safetensors(model: Model, path: Path, options: _Options) -> _Written:
    entries = _entries(model.tensors | (model.heads if options.heads else {}), options)
    about = timm_folder.metadata(model)
    if options.max_shard_bytes is None or sum(entry.bytes for entry in entries) <= options.max_shard_bytes:
        write_safetensors(path, entries, about)
        return _Written(len(entries), model.exact)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(timm_folder.config(model), indent=1))
    _write_shards(path, entries, options.max_shard_bytes, about)
    return _Written(len(entries), model.exact)


def _write_onnx(model: Model, path: Path, options: _Options) -> _Written:
    onnx.write(model, path, options.dtype)
    of_timm = model if model.exact else replace(model, source_features=None)
    # torch's exporter may write sizes of its example's, in silence
    compare(of_timm, path, "onnx", exact=True, dtype=options.dtype)
    return _Written(len(model.tensors), model.exact)


_WRITERS = {"timm": _write_timm, "hf": _write_hf, "safetensors": _write_safetensors, "onnx": _write_onnx}


def _write_shards(folder: Path, entries: list[Entry], most: int | None, about: dict[str, str]) -> None:
    """model.safetensors, or several and an index, each of `most` bytes of tensors at most but for single ones of more."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if most is not None and shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > most:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", entries, about)
        return
    named = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for name, shard in named.items():
        write_safetensors(folder / name, shard, about)
    places = {entry.key: name for name, shard in named.items() for entry in shard}
    index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _entries(tensors: dict[str, Lazy], options: _Options) -> list[Entry]:
    return [
        Entry(
            name,
            lazy.shape,
            options.dtype if lazy.dtype.is_floating_point else lazy.dtype,
            lambda name=name, lazy=lazy: _read(name, lazy, options),  # type: ignore[misc]
        )
        for name, lazy in tensors.items()
    ]


def _read(name: str, lazy: Lazy, options: _Options) -> Tensor:
    tensor = finite(name, lazy.read())
    options.told(_nbytes(lazy))
    return finite(name, tensor.to(options.dtype)) if tensor.is_floating_point() else tensor
