"""Weights as other programs and this one write them: a tag of timm's, files and folders, read into named tensors. Runs
nothing that a file brings (pickles are read with `weights_only`), and refuses what holds no tensors."""

from __future__ import annotations

import argparse
import difflib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict_from_hf
from torch import Tensor

from lejepa_scale.checkpoint.places import Place, place
from lejepa_scale.checkpoint.saved import CONFIG, MARKER, Saved, verify
from lejepa_scale.checkpoint.store import find
from lejepa_scale.config import Data, parsed
from lejepa_scale.errors import Exit, UserError

TAG = "timm:"
_WHOLE = ("model.safetensors", "pytorch_model.bin")  # as Hugging Face names them, the preferred one first
_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")
_DEPTH = 4  # of dictionaries in dictionaries; state_dict > teacher > backbone is 3


@dataclass(frozen=True)
class Source:
    """What was found. `sets` are the named tensors that lie together, by where they lie in the file ("" at the top)."""

    where: str
    sets: dict[str, dict[str, Tensor]]
    about: dict[str, Any] = field(
        default_factory=dict
    )  # config.json of a folder, metadata of an export, a run's config

    @property
    def model(self) -> str | None:
        """The model that the source says it holds."""
        named = self.about.get("architecture") or self.about.get("encoder") or self.about.get("architectures")
        return ", ".join(map(str, named)) if isinstance(named, list) else named

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """Side or sides in pixels that its position embeddings stand for, where it says so."""
        arguments = self.about.get("model_args")
        size = arguments.get("img_size") if isinstance(arguments, dict) else None
        pretrained = self.about.get("pretrained_cfg")
        if size is None and isinstance(pretrained, dict) and pretrained.get("input_size"):
            size = pretrained["input_size"][-2:]
        if size is None and str(self.about.get("image_size", "")).isdigit():
            size = int(self.about["image_size"])
        return tuple(size) if isinstance(size, list | tuple) else size

    @property
    def standardization(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of each channel that its inputs were standardized by, where it says so."""
        pretrained = self.about.get("pretrained_cfg")
        said = pretrained if isinstance(pretrained, dict) else self.about
        try:
            mean, std = (json.loads(v) if isinstance(v, str) else list(v) for v in (said["mean"], said["std"]))
            return [float(value) for value in mean], [float(value) for value in std]
        except (KeyError, TypeError, ValueError):
            return None


def read(named: str) -> Source:
    """The tensors that `named` means, on the CPU and as they are stored. Raises UserError, which says what to do."""
    if named.startswith(TAG):
        return _released(named)
    if "://" in named:
        return _checkpoint(named, place(named))
    path = Path(named).expanduser()
    if not path.exists():
        raise refusal(named, _not_there(named))
    if path.name == _WHOLE[0] and (path.parent / MARKER).exists():
        path = path.parent
    if (path / MARKER).exists() or ((path / "checkpoints").is_dir() and not (path / "config.json").exists()):
        return _checkpoint(named, path)
    if path.is_dir():
        return _folder(named, path)
    return _file(named, path)


def _checkpoint(named: str, path: Place) -> Source:
    try:
        verify(checkpoint := find(path), moments=False)
    except UserError as error:
        raise refusal(named, str(error), error.status) from error
    saved = Saved(checkpoint)
    data = parsed(saved.config_text(), str(checkpoint / CONFIG))["data"]
    about = {name: data.get(name, Data.model_fields[name].default) for name in ("mean", "std")}
    kind = saved.kind_of("best")
    where = f"{checkpoint}{' (averaged weights)' * saved.averaged}"
    return Source(where, {"": {name: saved.whole(name, kind) for name in saved.shapes}}, about)


def _file(named: str, path: Path) -> Source:
    if path.suffix == ".safetensors":
        tensors, metadata = _safetensors(named, path)
        return Source(str(path), {"": tensors}, dict(metadata))
    return Source(str(path), _pickled(named, path))


def refusal(named: str, text: str, status: Exit = Exit.MISTAKE) -> UserError:
    """The error that tells of the key."""
    return UserError(f"model.init_from={named}: {text}", status)


def _not_there(named: str) -> str:
    hint = f" Weights that timm has released are model.init_from={TAG}{named}."
    return f"there is no such file or folder.{hint if timm.is_model(named.partition('.')[0]) else ''}"


def _released(named: str) -> Source:
    """Weights that timm knows by a tag: out of the caches of Hugging Face and torch, or fetched into them."""
    name = named.removeprefix(TAG)
    model = name.partition(".")[0]
    known = timm.list_pretrained(f"{model}.*") if timm.is_model(model) else []
    if name not in known and (name != model or not known):
        near = difflib.get_close_matches(name, known or timm.list_pretrained(), n=3)
        raise refusal(
            named,
            f"timm {timm.__version__} has released no weights of that name; near it: {', '.join(near) or 'none'}.",
        )
    released: Any = timm.get_pretrained_cfg(name)
    try:
        if released.hf_hub_id:
            file = {"filename": released.hf_hub_filename} if released.hf_hub_filename else {}
            found: Any = load_state_dict_from_hf(released.hf_hub_id, weights_only=True, **file)
        else:
            found = torch.hub.load_state_dict_from_url(released.url, map_location="cpu", weights_only=True)
    except Exception as error:  # of huggingface_hub, of urllib, of torch: all mean that there is no file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"`hf download {released.hf_hub_id} --local-dir {name}`" if released.hf_hub_id else released.url
        raise refusal(
            named,
            f"the weights could not be fetched ({reason}). Fetch them where there is a network ({where}), bring them here, "
            "and name the folder or the file in place of the tag; or bring the cache (HF_HOME), which is looked into first.",
        ) from error
    says = {"input_size": released.input_size, "mean": released.mean, "std": released.std}
    return Source(named, dict(_sets(found)), {"architecture": released.architecture, "pretrained_cfg": says})


def _folder(named: str, folder: Path) -> Source:
    """A folder as timm and transformers write it: config.json, and weights in one file or in several with an index."""
    about = _json(named, folder / "config.json") if (folder / "config.json").exists() else {}
    for name in _WHOLE:
        if (index := folder / f"{name}.index.json").exists():
            return Source(str(folder), {"": _sharded(named, index)}, about)
    whole = [folder / name for name in _WHOLE if (folder / name).exists()]
    files = whole[:1] or sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS)
    if len(files) == 1:
        found = _file(named, files[0])
        return Source(str(folder), found.sets, about or found.about)
    there = f"holds {', '.join(file.name for file in files[:8])}: name the file" if files else "holds no weights"
    raise refusal(named, f"the folder {there}. A folder of weights has {' or '.join(_WHOLE)}, whole or with an index.")


def _sharded(named: str, index: Path) -> dict[str, Tensor]:
    """All files that an index names, which must hold what it says they do."""
    listed = _json(named, index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise refusal(named, f"{index} has no weight_map.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, listed.values()))):
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise refusal(named, f"{index} names {name}, which is not in the folder: bring it there.")
        tensors |= _safetensors(named, file)[0] if file.suffix == ".safetensors" else _pickled(named, file).get("", {})
    if missing := sorted(listed.keys() - tensors.keys()):
        raise refusal(named, f"{len(missing)} tensors that {index} names are in none of its files: {missing[0]}, ...")
    return tensors


def _json(named: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise refusal(named, f"cannot read {path}: {error}.") from error
    return found if isinstance(found, dict) else {}


def _safetensors(named: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise refusal(named, f"cannot read {path}: {error}. Copy or download it again.") from error


def _pickled(named: str, path: Path) -> dict[str, dict[str, Tensor]]:
    """What torch.save wrote, of which nothing but tensors and plain values is made."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # settings, in many a released file
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if wanted := _classes(path, error):
            raise refusal(
                named,
                f"reading {path} would run code that it names ({', '.join(wanted[:4])}), which is never done here. If you "
                'trust it, keep its tensors alone, where the program that wrote it is installed: python -c "import torch; '
                f"torch.save(torch.load('{path}', weights_only=False)['state_dict'], 'weights.pth')\" (state_dict: the "
                "name under which they lie), and name that file.",
            ) from error
        raise refusal(named, f"{path} is not a file that torch.save wrote.") from error
    except Exception as error:  # EOFError, KeyError, RuntimeError: whatever bytes make of an unpickler
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise refusal(named, f"cannot read {path}: {reason}. Copy or download it again.") from error
    sets = dict(_sets(found))
    if not sets:
        raise refusal(named, f"{path} holds no named tensors.")
    return sets


def _classes(path: Path, error: Exception) -> list[str]:
    """What a pickle asks for besides tensors and plain values."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a file of today's format: the message of the refusal names the first
        return re.findall(r"GLOBAL (\S+)", str(error))


def _sets(tree: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dictionaries that hold named tensors, at whatever depth."""
    if not isinstance(tree, Mapping) or depth > _DEPTH:
        return
    named = {name: value for name, value in tree.items() if isinstance(name, str)}
    if tensors := {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}:
        yield key, tensors
    for name, value in named.items():
        yield from _sets(value, f"{key}.{name}" if key else name, depth + 1)
