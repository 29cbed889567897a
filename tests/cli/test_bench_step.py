"""The benchmark of a step, at toy sizes: what it says of forms of a step is checked, times are not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmarks import compare, features, fed, trial
from benchmarks.features import Form
from benchmarks.trace import communication
from benchmarks.trial import Trial
from conftest import ROOT, Command, small_config

from lejepa_scale.errors import UserError

Rows = list[dict[str, Any]]
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path: Path, scenes: Path) -> Callable[..., trial.Recipe]:
    def make(*overrides: str) -> trial.Recipe:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(small_config(tmp_path / "run", scenes, train={"global_batch": 4})))
        return trial.Recipe(path, overrides)

    return make


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Rows]]:
    """tools/bench.py step in this process: (exit status, rows)."""
    import bench as program

    def run(*arguments: object) -> tuple[int, Rows]:
        out = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["bench.py", "step", "--json", str(out), *map(str, arguments)])
        code = program.main()
        return code, json.loads(out.read_text())["rows"] if out.exists() else []

    return run


@pytest.mark.slow
def test_rates_phases_and_forms(bench: Callable[..., tuple[int, Rows]], tmp_path: Path) -> None:
    trace = tmp_path / "deep" / "trace.json"
    code, rows = bench("--smoke", "--compare", "packed,attention", "checkpointing", "--profile", trace)
    assert code == 0
    by_section: dict[str, Rows] = {}
    for row in rows:
        by_section.setdefault(row["section"], []).append(row)
    whole, formula, *phases = by_section["step"]
    assert whole["tokens/s"] / whole["images/s"] == pytest.approx(formula["tokens per image"])
    assert {"images/s", "MFU", "MFU of a matrix product here", "forward ms", "working MiB"} <= whole.keys()
    assert formula["tokens per image"] == 2 * (8**2 + 1) + 2 * (4**2 + 1)  # the smoke recipe
    found = {row["case"].removeprefix("profile: "): row["share"] for row in phases}
    assert {"forward", "backward", "optimizer", "rest", "communication"} == found.keys()
    assert sum(found.values()) - found["communication"] == pytest.approx(1)
    names = {e["name"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"}
    assert {"forward", "backward", "optimizer"} <= names

    packed, per_group, per_view = by_section["packed"]
    assert "as configured" in packed["case"]
    assert per_group["ok"]
    assert per_view["ok"]
    assert ["cannot run" in row for row in by_section["attention"]] == [
        True,
        True,
        False,
        False,
    ]  # sdpa alone, on a CPU
    none, full, selective = by_section["checkpointing"]
    assert full["ok"]
    assert selective["ok"]
    assert full["working MiB"] < selective["working MiB"] < none["working MiB"]


@pytest.mark.slow
@pytest.mark.parametrize("its_own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_packed_step_gathers_half_as_much(command: Command, tmp_path: Path, its_own: bool) -> None:
    """Under FSDP on two ranks, of its own or a launcher's, against a forward per view group; gradients are reduced once
    either way."""
    out = tmp_path / "r.json"
    start, ranks = (["--ranks", 2], 0) if its_own else ([], 2)
    arguments = [*start, "--smoke", "--compare", "packed", "engine.name=fsdp", "model.options={depth: 3}"]
    result = command(ROOT / "tools/bench.py", "step", *arguments, "--json", out, ranks=ranks)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    packed, per_group, per_view = (row for row in rows if row["section"] == "packed")
    blocks, views = 3, 4
    others = packed["allgather"] - 2 * blocks  # the root's parameters, and those of the objective
    assert per_group["allgather"] - others == 2 * 2 * blocks
    assert per_view["allgather"] - others == views * 2 * blocks
    assert packed["reduce_scatter"] == per_group["reduce_scatter"]
    assert per_group["ok"]
    assert per_view["ok"]


def test_from_shards_and_the_loader_alone(recipe: Callable[..., trial.Recipe], tmp_path: Path) -> None:
    loader, coloured = fed.loader_rates(recipe().config(), CPU, 2)
    assert {"images/s", "images/s per core"} <= loader.keys() & coloured.keys()
    exact = ("train.micro_batch=2", "objective.accumulation=exact")
    for overrides, extra in (((), set()), (exact, {"first pass ms"})):
        row, *phases = fed.end_to_end(recipe(*overrides).config(), CPU, 2, tmp_path / "t.json")
        assert {
            "data wait ms",
            "colours ms",
            "forward ms",
            "backward ms",
            "probe ms",
            "optimizer ms",
        } | extra <= row.keys()
        assert 0 < row["data wait fraction"] < 1
        assert "profile: data wait" in {phase["case"] for phase in phases}


def test_forms_that_differ_are_found_out(recipe: Callable[..., trial.Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight changed by a thousandth, and an optimizer that does nothing, in forms that claim to be equal."""

    def perturb(engine: Any) -> None:
        with torch.no_grad():
            engine.module.encoder.blocks[0].attn.qkv.weight.mul_(1.001)

    def paralyze(engine: Any) -> None:
        engine.optimizer.step = lambda: None

    forms = [Form("the same"), Form("perturbed", alter=perturb), Form("paralyzed", alter=paralyze)]
    monkeypatch.setitem(features.FEATURES, "probe", lambda config: ("base", forms))
    _, *rows = compare.compare(recipe(), "probe", CPU, 1)
    assert [row["ok"] for row in rows] == [True, False, False]
    monkeypatch.setitem(features.FEATURES, "probe", lambda config: ("base", forms[:1]))
    _, same = compare.compare(recipe(), "probe", CPU, 1, apart=True)
    assert same["ok"]
    assert same["measured"] == "one after the other"


def test_masked_depth_leaves_out_what_it_draws(recipe: Callable[..., trial.Recipe]) -> None:
    """Of every sequence either branch is dropped or doubled (p = 1/2); the subset form agrees on a row of everything."""
    options = ("model.drop_path=0.5", "model.drop_path_uniform=true", "model.options={depth: 1}")
    trial = Trial(recipe(*options).config(), CPU)
    block: Any = trial.engine.module.encoder.blocks[0]
    from benchmarks.baselines import masked_depth

    from lejepa_scale.model.attention import Packing
    from lejepa_scale.model.packed import rows

    packing = Packing(((24, 5), (16, 3)))
    x = torch.randn(packing.tokens, 128)
    (row,) = rows([block], packing, [None, None], CPU, "sdpa")
    whole = row._replace(branch=packing, kept=None)
    with torch.no_grad():
        attended = block.attn(block.norm1(x), whole)
        both = [x + a * attended for a in (0, 2)]
        possible = [y + m * block.mlp(block.norm2(y)) for y in both for m in (0, 2)]
        masked_depth(trial.engine)
        found = block(x, row)
        block.eval()
        assert block(x, row).allclose(x + attended + block.mlp(block.norm2(x + attended)), atol=1e-5)
    drawn = set()
    for sequence, *choices in zip(*([s for g in packing.split(t) for s in g] for t in (found, *possible)), strict=True):
        matching = [i for i, choice in enumerate(choices) if sequence.allclose(choice, atol=1e-5)]
        assert len(matching) == 1
        drawn.add(matching[0])
    assert drawn == {0, 1, 2, 3}


def test_stochastic_depth_and_optimizers(recipe: Callable[..., trial.Recipe]) -> None:
    subset, masked, none = compare.compare(recipe("model.drop_path=0.4"), "stochastic-depth", CPU, 1)
    assert "ok" not in masked.keys() | none.keys()  # other random numbers: no verdict
    assert masked["loss differs by"] > 0
    assert subset["working MiB"] < masked["working MiB"]
    _, foreach, loop = compare.compare(recipe(), "optimizer", CPU, 1)
    assert foreach["ok"]
    assert loop["ok"]


def test_patches_that_are_left_out(recipe: Callable[..., trial.Recipe]) -> None:
    options = ("model.patch_drop.global=0.6", "model.patch_drop.local=0.3")
    some, every = compare.compare(recipe(*options), "patch-drop", CPU, 1)
    assert "ok" not in every  # another loss: no verdict
    assert some["working MiB"] < every["working MiB"]
    _, per_group, per_view = compare.compare(recipe(*options), "packed", CPU, 1)
    assert per_group["ok"]  # each group drops its own share, of its own draw
    assert "ok" not in per_view


def test_communication_that_nothing_hides() -> None:
    def event(name: str, begun: int, ended: int) -> dict[str, Any]:
        return {"cat": "kernel", "name": name, "ts": begun, "dur": ended - begun}

    gathers = [event("ncclDevKernel_AllGather", 0, 10), event("ncclDevKernel_ReduceScatter", 8, 14)]
    compute = [event("gemm", 4, 9), event("gemm", 9, 11), event("gelu", 20, 30)]
    found = communication([*compute, *gathers, {"name": "gloo:all_reduce", "ts": 0, "dur": 99}])
    assert found == {"communication": 14, "communication alone": 7}
    assert communication([{"name": "gloo:all_reduce", "ts": 2, "dur": 5}]) == {"communication": 5}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--compare", "packd"), "did you mean packed?"),
        (("--compare", "prefetch"), "engine.prefetch is for fsdp and zero3"),
        (("--compare", "stochastic-depth"), "model.drop_path=0"),
        (("--compare", "patch-drop"), "add model.patch_drop.global=0.3"),
        (("train.micro_batch=3",), "is not train.micro_batch x ranks x accumulation"),
        (("--mode", "loader", "--profile", "t.json"), "--mode end-to-end"),
        (("--ranks", 2, "engine.name=single"), "2 were started"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bench: Callable[..., tuple[int, Rows]], capsys: pytest.CaptureFixture[str], recipe: Any, arguments: Any, words: str
) -> None:
    code, rows = bench("--config", recipe().path, *arguments)
    assert code == 2
    assert not rows
    assert words in capsys.readouterr().err


def test_a_recipe_is_needed() -> None:
    with pytest.raises(UserError, match="there are packed"):
        features.forms("nothing of the kind", Any)  # type: ignore[arg-type]
