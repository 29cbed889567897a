"""What DeepSpeed's own `save_checkpoint` writes: of every rank its flat partitions (ZeRO-1, 2, 3). Read without DeepSpeed,
and without running what the pickles name: its classes are stood in for by ones that do nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lejepa_scale.conversion.model import Lazy, at_hand
from lejepa_scale.conversion.pickled import loaded
from lejepa_scale.conversion.training import Counters, TrainingState, rebuilt, texts_of
from lejepa_scale.engine.base import MOMENTS, VALUE
from lejepa_scale.errors import UserError

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_CLASSES = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)
_Parts = list[tuple[Tensor, int, int]]  # flat tensor, first element, number of elements: of every rank in turn


def folder_of(named: Path) -> Path | None:
    """The folder with the ranks' files: that one, or the one that `latest` names; None where there is none."""
    latest = named / "latest"
    tag = named / latest.read_text(errors="replace").strip() if latest.is_file() else named
    inside = tag.parent == named or tag == named
    return tag if inside and tag.is_dir() and any(_OPTIMIZER.fullmatch(path.name) for path in tag.iterdir()) else None


def read(named: Path, config: Path | None = None) -> TrainingState:
    """config: that of the run, where there is none beside it. Raises UserError where something is missing, or cannot be
    read."""
    folder = folder_of(named)
    assert folder is not None
    paths = {int(found[1]): path for path in folder.iterdir() if (found := _OPTIMIZER.fullmatch(path.name))}
    if sorted(paths) != list(range(len(paths))):
        raise UserError(f"{folder} holds the partitions of ranks {sorted(paths)}: some are missing.")
    about = loaded(next((folder / name for name in _MODEL if (folder / name).exists()), folder / _MODEL[0]), _CLASSES)
    try:
        ranks = [loaded(paths[rank], _CLASSES)["optimizer_state_dict"] for rank in sorted(paths)]
        count = ranks[0]["partition_count"]
        if (count := max(count) if isinstance(count, list) else count) != len(ranks):
            raise UserError(f"{folder} holds the partitions of {len(ranks)} ranks, of the {count} that wrote it.")
        shapes = {str(name): tuple(map(int, shape)) for group in about["param_shapes"] for name, shape in group.items()}
        buffers = {name: about["module"][name] for name in about["buffer_names"]}
        third = "fp32_flat_groups" in ranks[0]
        states = [(rank["optimizer_state_dict"] if third else rank["base_optimizer_state"])["state"] for rank in ranks]
        kinds = [VALUE, *(MOMENTS if states[0] else ())]
        parts = {kind: (_of_third if third else _of_first)(ranks, states, kind, shapes) for kind in kinds}
        updates = max((int(state["step"]) for state in states[0].values()), default=0)
        steps = int(about["global_steps"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{folder} is not what DeepSpeed writes of ZeRO-1, 2 or 3: {error!r}.") from error
    tensors = {
        kind: {
            name: Lazy(shape, torch.float32, _joined(name, shape, parts[kind].get(name, [])))
            for name, shape in shapes.items()
        }
        for kind in kinds
    }
    for name, buffer in buffers.items():
        tensors[VALUE][name] = at_hand(buffer)
    return rebuilt(str(folder), tensors, texts_of(named, config, Counters(steps, updates)))


def _of_third(ranks: list[Any], states: list[Any], kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, _Parts]:
    """ZeRO-3 cuts every parameter evenly over the ranks, the last part padded; a rank's parts lie in the parameters' order,
    in one flat tensor for each group of them."""
    found: dict[str, _Parts] = {name: [] for name in shapes}
    for rank, state in zip(ranks, states, strict=True):
        flats = rank["fp32_flat_groups"] if kind == VALUE else [state[i][kind] for i in sorted(state)]
        number, at = 0, 0
        for name, shape in shapes.items():
            length = -(-prod(shape) // len(ranks))
            while at >= len(flats[number]):
                number, at = number + 1, 0
            found[name].append((flats[number], at, length))
            at += length
    return found


def _of_first(ranks: list[Any], states: list[Any], kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, _Parts]:
    """ZeRO-1 and 2 cut groups of parameters; each rank says which of its elements are whose."""
    found: dict[str, _Parts] = {name: [] for name in shapes}
    for rank, state in zip(ranks, states, strict=True):
        for number, (flat, mapping) in enumerate(
            zip(rank["single_partition_of_fp32_groups"], rank["param_slice_mappings"], strict=True)
        ):
            held = flat if kind == VALUE else state[number][kind]
            for name, address in mapping.items():
                found[name].append((held, int(address.start), int(address.numel)))
    return found


def _joined(name: str, shape: tuple[int, ...], parts: _Parts) -> Callable[[], Tensor]:
    def read() -> Tensor:
        flat = (
            torch.cat([tensor.view(-1)[at : at + length] for tensor, at, length in parts]) if parts else torch.empty(0)
        )
        if flat.numel() < prod(shape):
            raise UserError(f"the ranks hold {flat.numel()} of the {prod(shape)} elements of {name}.")
        return flat[: prod(shape)].view(shape).float()

    return read
