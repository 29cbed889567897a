"""DeepSpeed's universal checkpoint: a folder for every parameter, which ZeRO-1, 2 and 3 load at any number of ranks with
`"checkpoint": {"load_universal": true}`. Written and read parameter by parameter, without DeepSpeed; what is read is never
unpickled beyond tensors and plain values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lejepa_scale.conversion.model import Lazy, at_hand
from lejepa_scale.conversion.pickled import loaded
from lejepa_scale.conversion.training import Counters, TrainingState, rebuilt, texts_beside, texts_of
from lejepa_scale.engine.base import AVERAGE, MOMENTS, MOMENTUM, VALUE
from lejepa_scale.errors import UserError

LATEST = "latest_universal"
_MODEL, _OPTIMIZER, _FOLDER = "mp_rank_00_model_states.pt", "optimizer_state.pt", "zero"
_FILES = {VALUE: "fp32.pt", **{kind: f"{kind}.pt" for kind in MOMENTS}}
_AVERAGED = "average.pt"  # beside it: DeepSpeed would take a further file of a parameter's folder for a moment
_GROUPS = 1024  # of parameters, at most: DeepSpeed passes over groups of the optimizer that a file does not name
_VERSION = "0.19.5"  # of DeepSpeed's format; what reads it demands a number


def write(state: TrainingState, folder: Path, told: Callable[[int], object]) -> int:
    """Number of tensors. Raises UserError for a state of Muon's, with which DeepSpeed's optimizers cannot go on."""
    if MOMENTUM in state.tensors:
        raise UserError(
            f"{state.where} was trained with optim.name=muon, whose momentum has no place in a checkpoint of DeepSpeed's: "
            "convert it --to dcp."
        )
    tag = folder / f"global_step{state.progress.step}_universal"
    (tag / _FOLDER).mkdir(parents=True)
    updates, count = torch.tensor(float(state.progress.updates)), 0
    whole: dict[str, dict[str, Tensor]] = {VALUE: {}, AVERAGE: {}}
    for kind, name, lazy in state.each():
        tensor, count = lazy.read(), count + 1
        told(tensor.nbytes)
        if kind == AVERAGE or name in state.buffers:
            whole[kind][name] = tensor
            continue
        place = tag / _FOLDER / name
        place.mkdir(exist_ok=True)
        torch.save({"param": tensor}, place / _FILES[kind])
        if kind == MOMENTS[0]:
            torch.save(updates, place / "step.pt")
    groups: list[dict[str, Any]] = [{} for _ in range(_GROUPS)]
    about: dict[str, Any] = {"ds_version": _VERSION, "param_groups": groups}
    about["optimizer_state_dict"] = {"state": {0: {"step": updates}}, "param_groups": groups}
    torch.save(about, tag / _FOLDER / _OPTIMIZER)
    if whole[AVERAGE]:
        torch.save(whole[AVERAGE], tag / _AVERAGED)
    counters = {"global_steps": state.progress.step, "global_samples": 0, "skipped_steps": 0}
    ranks = {"dp_world_size": 1, "mp_world_size": 1}
    plain: dict[str, Any] = {"ds_version": _VERSION, "ds_config": {}, "lr_scheduler": None, "optimizer": None}
    about = {"module": whole[VALUE], "buffer_names": list(state.buffers), **counters, **ranks, **plain}
    for prefix in ("", "zero_pp_rank_0_"):  # as stages 1 and 2, and as stage 3 looks for it
        torch.save(about, tag / f"{prefix}{_MODEL}")
    for name, text in texts_beside(state).items():
        (folder / name).write_text(text)
    (folder / LATEST).write_text(tag.name)
    return count


def is_one(folder: Path) -> bool:
    return (folder / LATEST).is_file()


def read(folder: Path, config: Path | None = None) -> TrainingState:
    """The one that `latest_universal` names. config: that of the run, where there is none beside it. Raises UserError where
    it cannot be read."""
    named = (folder / LATEST).read_text(errors="replace").strip()
    tag = folder / named
    if Path(named).name != named or not (tag / _FOLDER).is_dir():
        raise UserError(f"{folder / LATEST} names {named!r}, in which there is no folder {_FOLDER}.")
    tensors: dict[str, dict[str, Lazy]] = {}
    for place in sorted(path for path in (tag / _FOLDER).iterdir() if path.is_dir()):
        for kind, file in _FILES.items():
            if (place / file).exists():
                found = _parameter(place / file)
                read_it = partial(_parameter, place / file)
                tensors.setdefault(kind, {})[place.name] = Lazy(tuple(found.shape), found.dtype, read_it)
    module = loaded(tag / _MODEL)
    averages = loaded(tag / _AVERAGED) if (tag / _AVERAGED).exists() else {}
    if not isinstance(module, dict) or not isinstance(averages, dict):
        raise UserError(f"{tag / _MODEL} holds no named tensors.")
    for kind, named_tensors in ((VALUE, module.get("module") or {}), (AVERAGE, averages)):
        for name, tensor in named_tensors.items():
            if isinstance(tensor, Tensor):
                tensors.setdefault(kind, {}).setdefault(str(name), at_hand(tensor))
    steps = [*(tag / _FOLDER).glob("*/step.pt")][:1]
    updates = int(loaded(steps[0])) if steps else int(module.get("global_steps") or 0)
    said = Counters(int(module.get("global_steps") or 0), updates)
    return rebuilt(str(folder), tensors, texts_of(folder, config, said))


def _parameter(path: Path) -> Tensor:
    found = loaded(path)
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, Tensor):
        raise UserError(f"{path} holds no tensor.")
    return tensor
