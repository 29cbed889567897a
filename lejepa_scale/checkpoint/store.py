"""Checkpoints on disk: written aside, synced, renamed, marked complete; verified before they are read.

checkpoints/step_00001000/
    model.safetensors      fp32 parameters and buffers, the module's names
    optimizer.safetensors  AdamW moments, `exp_avg/NAME` and `exp_avg_sq/NAME`
    probe.safetensors      online probe, where there is one
    state.json             step and counters
    config.yaml            the resolved configuration
    COMPLETE               JSON: bytes and CRC-32 of every file above; written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lejepa_scale.checkpoint.state import CanonicalState
from lejepa_scale.engine.base import MOMENTS
from lejepa_scale.errors import UserError

_MARKER = "COMPLETE"
_NAME = re.compile(r"step_(\d{8})$")


@dataclass
class Progress:
    """Where a run stands: `step` optimizer steps are done. With the configuration this determines all that follows."""

    step: int
    data_fingerprint: str
    updates: int = 0
    nonfinite: int = 0
    skipped_images: int = 0
    seconds: float = 0.0


class Store:
    """The checkpoints of one run directory. Used by rank 0."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.root, self.keep = run_dir / "checkpoints", keep

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(p for p in self.root.iterdir() if _NAME.search(p.name) and (p / _MARKER).exists())

    def latest(self) -> Path | None:
        complete = self.complete()
        return complete[-1] if complete else None

    def save(self, state: CanonicalState, probe: dict[str, Tensor], progress: Progress, config_yaml: str) -> Path:
        """Write one checkpoint; older ones beyond `keep` go, and so do the remains of interrupted writes. Raises UserError,
        before anything is written, naming a tensor that is not finite."""
        moments = _flat(state.moments)
        if fault := not_finite({**state.model, **moments, **_of_probe(probe)}):
            raise UserError(
                f"step {progress.step} is not saved: {fault}. {self.latest() or 'No checkpoint'} is untouched; the same "
                "command goes on from there."
            )
        target = self.root / f"step_{progress.step:08d}"
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(state.model, partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        if probe:
            save_file(probe, partial / "probe.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(progress), indent=1))
        (partial / "config.yaml").write_text(config_yaml)
        files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(partial.iterdir())}
        for path in partial.iterdir():
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        marker = target / (_MARKER + ".partial")
        marker.write_text(json.dumps(files, indent=1))
        _sync(marker)
        marker.rename(target / _MARKER)
        _sync(self.root)
        self._prune()
        return target

    def load(self, path: Path) -> tuple[CanonicalState, dict[str, Tensor], Progress]:
        """Read a checkpoint after comparing every file with the completion marker. Raises UserError naming the file."""
        verify(path)
        try:
            progress = Progress(**json.loads((path / "state.json").read_text()))
            moments: dict[str, dict[str, Tensor]] = {}
            for key, tensor in load_file(path / "optimizer.safetensors").items():
                kind, _, name = key.partition("/")
                moments.setdefault(kind, {})[name] = tensor
            probe = load_file(path / "probe.safetensors") if (path / "probe.safetensors").exists() else {}
            state = CanonicalState(load_file(path / "model.safetensors"), moments, progress.updates)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(f"checkpoint {path} cannot be read: {error}. {_advice(path)}") from error
        if moments and set(moments) != set(MOMENTS):
            raise UserError(f"checkpoint {path} holds moments {sorted(moments)}, expected {list(MOMENTS)}.")
        if fault := not_finite({**state.model, **_flat(moments), **_of_probe(probe)}):
            raise UserError(f"checkpoint {path} cannot be gone on from: {fault}. {_advice(path)}")
        return state, probe, progress

    def _prune(self) -> None:
        for old in self.complete()[: -self.keep]:
            (old / _MARKER).unlink()  # first, so that half a deletion is never resumed from
            shutil.rmtree(old)
        for remains in self.root.glob("*.partial"):
            shutil.rmtree(remains, ignore_errors=True)


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its completion marker. Raises UserError naming the first that differs."""
    try:
        files = json.loads((path / _MARKER).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete checkpoint: {path / _MARKER} cannot be read ({error}).") from error
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            raise UserError(f"checkpoint file {file} is missing. {_advice(path)}")
        if file.stat().st_size != expected["bytes"] or _crc32(file) != expected["crc32"]:
            raise UserError(f"checkpoint file {file} is corrupt: its checksum differs from {_MARKER}. {_advice(path)}")


def _flat(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{kind}/{name}": tensor for kind, group in moments.items() for name, tensor in group.items()}


def _of_probe(probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"probe: {name}": tensor for name, tensor in probe.items()}


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Names the first tensor that holds something else than numbers; None where all are finite."""
    for name, tensor in tensors.items():
        if not (finite := tensor.isfinite()).all():
            return f"{int((~finite).sum())} of {tensor.numel()} values of {name} are not finite"
    return None


def find(path: Path) -> Path:
    """The checkpoint meant by a run directory (its newest complete one) or a step directory. Raises UserError."""
    if (path / _MARKER).exists():
        return path
    latest = Store(path, keep=1).latest()
    if latest is None:
        raise UserError(f"{path} is neither a complete checkpoint nor a run directory that holds one.")
    return latest


def _advice(path: Path) -> str:
    return f"Restore it, or delete {path} to go on from the checkpoint before."


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
