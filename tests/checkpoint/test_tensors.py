"""Our reader of safetensors against safetensors' own: what that reads is read alike, what that refuses is refused, before
any memory is asked for."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lejepa_scale.checkpoint.tensors import TensorFile

SOUND = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
}


def written(path: Path, header: Any, data: int = 32, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(range(data)))
    return path


def without(name: str, **changed: Any) -> dict[str, Any]:
    return {**SOUND, name: {**SOUND[name], **changed}}


FOREIGN: dict[str, tuple[Any, int, int | None]] = {
    "an empty file": (b"", 0, 0),
    "a length beyond the file": (SOUND, 32, 1 << 40),
    "a length beyond all": (SOUND, 32, (1 << 64) - 1),
    "no JSON": (b"{" * 40, 32, None),
    "a list": ([1, 2], 32, None),
    "a number": (b"17", 32, None),
    "bytes that are no text": (b"\xff\xfe{}", 32, None),
    "a row that is text": ({**SOUND, "b": "x"}, 32, None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, None),
    "three offsets": (without("b", data_offsets=[24, 28, 32]), 32, None),
    "an unknown type": (without("a", dtype="F31"), 32, None),
    "a negative side": (without("a", shape=[-2, -3]), 32, None),
    "another shape": (without("a", shape=[3, 3]), 32, None),
    "a shape of exabytes": (without("a", shape=[1 << 40, 1 << 40]), 32, None),
    "overlap": (without("b", data_offsets=[16, 24]), 32, None),
    "a gap": (without("b", data_offsets=[32, 40]), 40, None),
    "beyond the end": (without("b", data_offsets=[24, 32]), 28, None),
    "more bytes than tensors": (SOUND, 64, None),
    "before the beginning": (without("a", data_offsets=[-24, 0]), 32, None),
    "an end before its beginning": (without("a", data_offsets=[24, 0]), 32, None),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_safetensors_refuses_is_refused(tmp_path: Path, case: str) -> None:
    header, data, length = FOREIGN[case]
    path = written(tmp_path / "x.safetensors", header, data, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((SafetensorError, OSError)), safe_open(path, "pt"):
        pass
    with pytest.raises(ValueError, match=r"\w"):
        TensorFile(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_sound_one_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", SOUND)
    assert TensorFile(path).keys() == ["a", "b"]
    with safe_open(path, "pt") as file:
        assert torch.equal(TensorFile(path).tensor("a"), file.get_tensor("a"))
        assert torch.equal(TensorFile(path).tensor("b"), file.get_tensor("b"))


def test_every_type_is_that_of_safetensors(tmp_path: Path) -> None:
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
    ]
    tensors = {str(kind): torch.arange(-6, 6).view(3, 4).to(kind) for kind in kinds}
    tensors |= {
        "uint8": torch.arange(12, dtype=torch.uint8),
        "bool": torch.arange(12) % 2 == 0,
        "none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "note": "é"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt", "note": "é"}
    assert {name: file.dtype(name) for name in file.keys()} == {name: tensor.dtype for name, tensor in tensors.items()}
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in tensors.items())


def test_reading_a_part_takes_no_more_memory(tmp_path: Path) -> None:
    """A map of the file would count as this process's memory."""
    save_file({"big": torch.zeros(64 << 20, dtype=torch.uint8), "end": torch.ones(3)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start in range(0, 64 << 20, 1 << 20):
        assert not file.elements("big", start, start + (1 << 20)).any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
