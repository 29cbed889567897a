"""The benchmarks' own code, at toy sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Command


def test_waits_and_launches_of_a_recipe(command: Command, tmp_path: Path) -> None:
    result = command(ROOT / "tools/bench.py", "waits", "--smoke", "--json", tmp_path / "r.json", "train.global_batch=8")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    phases = ("colours", "forward", "backward", "optimizer", "probe", "between")
    assert row["waits a step"] == 0
    assert row["launches"] == sum(row[phase] for phase in phases)
    assert min(row[phase] for phase in phases) > 5


def test_a_section_that_fails_does_not_end_the_others() -> None:
    from benchmarks.measure import run_sections

    from lejepa_scale.errors import UserError

    def fails(error: Exception) -> Any:
        yield {"case": "before"}
        raise error

    cpu = torch.device("cpu")
    rows = run_sections({"a": fails(RuntimeError("gone")), "b": iter([{"case": "after"}])}, cpu, 1)["rows"]
    assert [(row["section"], row["case"]) for row in rows] == [
        ("a", "before"), ("a", "rest of the section"), ("b", "after")
    ]  # fmt: skip
    assert (rows[1]["ok"], rows[1]["failure"]) == (False, "RuntimeError: gone")
    with pytest.raises(UserError, match="advice"):
        run_sections({"a": fails(UserError("advice"))}, cpu, 1)


def test_where_numbers_cannot_go_is_said_before_any_is_measured(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = command(ROOT / "tools/bench.py", "order", "--json", tmp_path / "file/r.json")
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"{tmp_path}/file is no folder" in result.stderr


@pytest.mark.slow
def test_the_sigreg_benchmark_at_toy_sizes(command: Command, tmp_path: Path) -> None:
    """Agreement with the textbook form, and the bytes of real and of simulated ranks, are checked; times are not."""
    result = command(ROOT / "tools/bench.py", "sigreg", "--smoke", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {
        "arithmetic",
        "VISReg",
        "growth",
        "building",
        "ranks",
        "simulated ranks",
    }
    (compared,) = (row for row in rows if row["section"] == "arithmetic")
    assert compared["ok"]
    assert all(row["ok"] for row in rows if row["section"] == "VISReg")
    assert {"reference ms", "fused ms", "GEMMs ms", "times the GEMMs"} <= compared.keys()
    sums = [row["bytes"] for row in rows if ", sums," in row["case"]]
    assert len(set(sums)) == 1  # whatever the number of samples and of ranks
    assert len(sums) == 4


def test_the_input_benchmark_at_toy_sizes(command: Command, tmp_path: Path) -> None:
    """Every pipeline runs on scenes, the photographs are said to be absent, the workers' memory is flat; rates are not
    checked."""
    result = command(
        ROOT / "tools/bench.py", "input", "--smoke", "--photos", tmp_path / "absent.tar", "--json", tmp_path / "r.json"
    )
    assert result.returncode == 0, result.stderr
    photographs, scenes, memory = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert "absent" in photographs["not measured"]
    assert scenes["images"] == 8
    assert {"b/a", "c/a", "d/a", "a pillow images/s"} <= scenes.keys()
    assert memory["ok"]
    assert len(memory["MB by epoch"]) == 6


@pytest.mark.slow
def test_the_evaluation_benchmark_at_toy_sizes(command: Command, tmp_path: Path) -> None:
    """Both loops give features of all images, and k-NN's memory is measured; rates are not checked."""
    arguments = ["evaluation", "--smoke", "--photos", tmp_path / "absent.tar", "--json", tmp_path / "r.json"]
    result = command(ROOT / "tools/bench.py", *arguments)
    assert result.returncode == 0, result.stderr
    free, tiny, search, paper = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert "8 scenes" in free["case"]
    assert free["ours/DataLoader"] == pytest.approx(free["ours images/s"] / free["DataLoader images/s"])
    assert tiny["ours images/s"] > 0
    assert 0 < search["beside the features MB"] < 500
    assert paper["TFLOP"] == pytest.approx(131.2, rel=1e-3)


def test_the_order_benchmark_at_toy_sizes() -> None:
    from benchmarks import order

    rows = [*order.scale(10**6, 1000), *order.mixing(50)]
    assert rows[-1]["displacement / n"] == pytest.approx(1 / 3, abs=0.01)
    (memory,) = (row for row in rows if "peak MiB" in row)
    assert memory["peak MiB"] < 10
