"""Encoders in files and folders of others, which say themselves what they are: ours, timm's, transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lejepa_scale.checkpoint import sources
from lejepa_scale.conversion import native_folder
from lejepa_scale.conversion.model import HEADS, Inputs, Lazy, Model, in_memory, lazies, of_timm, opened
from lejepa_scale.errors import UserError


def of_file(path: Path) -> Model:
    """One safetensors file of `lejepa convert`, whose metadata say how to build the model, or that of a folder with
    config.json. Raises UserError."""
    beside = path.name in _WHOLE and (path.parent / "config.json").exists()
    if path.suffix != ".safetensors":
        if beside:
            return of_folder(path.parent)
        raise UserError(f"{path} does not say which encoder it is for: name it with --encoder NAME.")
    file = opened(path)
    if beside and "timm" not in file.metadata:
        return of_folder(path.parent)
    try:
        arguments = json.loads(file.metadata["timm"])
        name = str(arguments.pop("model_name"))
        mean, std = (tuple(map(float, json.loads(file.metadata[key]))) for key in ("mean", "std"))
        ranges = tuple(json.loads(file.metadata.get("ranges", "[]")))
        size, channels = int(file.metadata["image_size"]), int(file.metadata["channels"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not say which encoder it is for ({type(error).__name__}: {error}), as a file of `lejepa convert` "
            "does: name it with --encoder NAME."
        ) from error
    inputs = Inputs(size, channels, mean, std, ranges if any(ranges) else ())
    tensors = {k: lazy for k, lazy in lazies(file).items() if not k.startswith(HEADS)}
    return of_timm(str(path), name, arguments, inputs, tensors)


def of_folder(path: Path) -> Model:
    """config.json of timm's or of a class of transformers that a model of timm's equals, and weights in one file or in
    several with an index. Raises UserError."""
    try:
        about = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise _undescribed(path, error) from error
    if isinstance(about, dict) and "architecture" not in about and about.get("model_type") in native_folder.CLASSES:
        return native_folder.model(path, about, _of_files(path))
    try:
        name = str(about["architecture"])
        cfg = about.get("pretrained_cfg") or {}
        channels, height, width = (int(side) for side in cfg["input_size"])
        mean, std = (tuple(map(float, cfg[key])) for key in ("mean", "std"))
        arguments = dict(about.get("model_args") or {})
        arguments["num_classes"] = int(about.get("num_classes", cfg.get("num_classes", 0)))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _undescribed(path, error) from error
    if height != width:
        raise UserError(f"{path / 'config.json'}: images of {height} x {width} pixels are not square.")
    if channels != 3:
        arguments.setdefault("in_chans", channels)
    ours = about.get("lejepa_scale") or {}
    inputs = Inputs(height, channels, mean, std, tuple(ours.get("ranges") or ()))
    return of_timm(str(path), name, arguments, inputs, _of_files(path), ours.get("run"))


def _undescribed(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path / 'config.json'} does not describe an encoder of timm's, nor one of transformers' "
        f"{', '.join(native_folder.CLASSES.values())} ({type(error).__name__}: {error}): name it with --encoder NAME."
    )


_WHOLE = ("model.safetensors", "pytorch_model.bin")


def _of_files(path: Path) -> dict[str, Lazy]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        for name in _WHOLE:
            if (path / name).exists() or (path / f"{name}.index.json").exists():
                return lazies(opened(path / name)) if name == _WHOLE[0] else _pickled(path)
        raise UserError(f"{path} holds no model.safetensors, whole or with an index.")
    try:
        named = {str(key): str(value) for key, value in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error!r}.") from error
    out: dict[str, Lazy] = {}
    for name in sorted(set(named.values())):
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{index} names {name}, which is not in the folder: bring it there.")
        out |= lazies(opened(path / name))
    if missing := sorted(named.keys() ^ out.keys()):
        raise UserError(f"{index} and its files differ in {len(missing)} tensors: {', '.join(missing[:4])}.")
    return out


def _pickled(path: Path) -> dict[str, Lazy]:
    """What torch.save wrote, of which nothing but tensors is made; whole in memory."""
    try:
        found: dict[str, Any] = sources.read(str(path)).sets
    except UserError as error:
        raise UserError(str(error).removeprefix("model.init_from=")) from error
    return in_memory(found.get("", {}))
