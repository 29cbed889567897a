"""Benchmarks that say something of a GPU without one: what an operator has to move, and what fewer bits change."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from benchmarks import fake_cuda, roofline, rounding
from conftest import ROOT, Command
from ranks import run_ranks

aten = torch.ops.aten


def _launches() -> list[fake_cuda.Launch]:
    with fake_cuda.pretended() as watch:
        x, y = (torch.zeros(6, 8, device=fake_cuda.CUDA, dtype=torch.bfloat16) for _ in range(2))
        index = torch.zeros(3, device=fake_cuda.CUDA, dtype=torch.int32)
        watch.launches.clear()
        x + y
        x.add_(y)
        x.copy_(y)
        x.float()
        x.index_select(0, index)
        x @ y.T
        x + torch.zeros(1, 1, device=fake_cuda.CUDA, dtype=torch.bfloat16).expand(6, 8)
        torch._foreach_mul_([x, y], 2.0)
        x.view(8, 6)
        return list(watch.launches)


@pytest.mark.unchecked
def test_bytes_and_products_of_an_operator() -> None:
    """Counted by hand: 48 numbers of 2 bytes are 96."""
    (found,) = run_ranks(_launches, 1)
    expected = [
        ("add", 3 * 96, 0),
        ("add_", 3 * 96, 0),
        ("copy_", 2 * 96, 0),  # what is there is not read
        ("_to_copy", 96 + 192, 0),
        ("index_select", 2 * 48 + 12, 0),  # three rows of six
        ("mm", 2 * 96 + 72, 2 * 6 * 6 * 8),
        ("zeros", 2, 0),
        ("add", 2 * 96 + 2, 0),  # one number, expanded
        ("_foreach_mul_", 4 * 96, 0),
    ]
    assert [(x.name, x.bytes, x.flops) for x in found] == expected


def test_time_of_an_operator_is_the_longest_of_three() -> None:
    rates = roofline.Rates(products=1e12, attention=1e12, memory=1e9, kernel=1e-6)
    for size, flops, seconds in ((10, 0, 1e-6), (10**6, 10**6, 1e-3), (10**6, 10**10, 1e-2)):
        assert roofline.duration(fake_cuda.Launch("", "", size, flops), rates) == pytest.approx(seconds)


def test_rounding_to_tf32_keeps_ten_bits() -> None:
    """Against Python's integers; halves away from zero."""
    values = [1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 3.1415927, -1e-30, 65504.0, 0.0]
    for value, found in zip(values, rounding.as_tf32(torch.tensor(values)).tolist(), strict=True):
        bits = struct.unpack("<i", struct.pack("<f", value))[0]
        sign, size = bits & -(1 << 31), bits & 0x7FFFFFFF
        expected = struct.unpack("<f", struct.pack("<i", sign | ((size + (1 << 12)) >> 13 << 13)))[0]
        assert found == expected


def test_tables_of_rounding(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    result = command(ROOT / "tools/bench.py", "rounding", "--smoke", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    tf32 = [row for row in rows if row["section"] == "tf32"]
    assert len(tf32) == 15
    for row in tf32:
        assert 0 < row["gradient changes by"] < 2e-2
        assert row["changes by"] < 1e-3  # few samples and directions
    assert len([row for row in rows if row["section"] == "float8"]) == 12


def test_the_roofline_of_a_recipe(command: Command, tmp_path: Path) -> None:
    words = ["roofline", "--smoke", "--json", tmp_path / "r.json", "train.global_batch=8"]
    result = command(ROOT / "tools/bench.py", *words)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    h200, h100 = rows[:2]
    assert h200["ms"] < h100["ms"]
    for row in (h200, h100):
        parts = sum(row[f"{kind}, ms"] for kind in ("products", "attention", "memory"))
        assert parts == pytest.approx(row["ms"])
        assert 0 < row["MFU"] < 1
    assert max(rows[2:], key=lambda row: row["ms on H200 on paper"]) == rows[2]
