"""`bench.py gpu`: whatever a case does, the others' rows are in the file, and another call goes on from there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu, kernels
from benchmarks.apart import measured
from benchmarks.record import Record, tables
from conftest import ROOT, Command, script_environment
from processes import eventually, program

from lejepa_scale.config import check_world
from lejepa_scale.cost import step_memory
from lejepa_scale.errors import UserError

CASES = ROOT / "tests/bench_cases.py"
Rows = list[dict[str, Any]]
MACHINE = {"device": "H100", "torch": "2.13.0", "sizes": "full", "source": "ab", "commit": "c1", "date": "2026-11-28"}


def rows_of(path: Path, section: str, task: str | None = None) -> Rows:
    rows = json.loads(path.read_text())["rows"]
    return [row for row in rows if row["section"] == section and task in (None, row["task"])]


def test_it_refuses_without_a_gpu(command: Command, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: run tools/bench.py gpu")
    result = command(ROOT / "tools/bench.py", "gpu", "--json", tmp_path / "r.json")
    assert result.returncode == 2
    assert "nothing was measured" in result.stderr
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
def test_every_section_at_toy_sizes(command: Command, tmp_path: Path) -> None:
    """And again: all is taken over."""
    out, page = tmp_path / "r.json", tmp_path / "r.md"
    arguments = [ROOT / "tools/bench.py", "gpu", "--smoke", "--json", out, "--markdown", page]
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    first = json.loads(out.read_text())
    assert list(dict.fromkeys(row["section"] for row in first["rows"])) == list(gpu.SECTIONS)
    assert not [row for row in first["rows"] if row.get("ok") is False or "not measured" in row]
    assert [heading for heading in page.read_text().splitlines() if heading.startswith("#")] == [
        f"### {name}" for name in gpu.SECTIONS
    ]

    shares = [row["share"] for row in rows_of(out, "profile") if ": share: " in row["case"]]
    assert sum(shares) == pytest.approx(1, abs=0.05)
    assert len([row for row in rows_of(out, "profile") if "kind" in row]) == kernels.LONGEST
    assert all(0.5 < row["peak / formula"] < 2 for row in rows_of(out, "memory"))
    (zero3,) = rows_of(out, "nccl", "zero3")
    assert "cannot run" in zero3 or 0 <= zero3["differs by"] < 0.02

    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert f"step-rates {len(gpu.TOY.steps)}" in result.stderr
    again = json.loads(out.read_text())
    assert (again["rows"], again["done"]) == (first["rows"], first["done"])


@pytest.mark.slow
def test_sections_can_be_chosen(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "deep/r.json"
    result = command(ROOT / "tools/bench.py", "gpu", "--smoke", "--only", "colours", "--json", out)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["section"], row["ok"]) == ("colours", True)
    assert "### colours" in result.stdout
    assert "| 8 views of 32 px | yes |" in result.stdout


def test_a_failure_costs_one_case(command: Command, tmp_path: Path) -> None:
    """Errors, dead processes, spoiled devices and endless work; and another call tries those again, and those alone."""
    out = tmp_path / "r.json"
    result = command(CASES, "failing", out, 1)
    assert result.returncode == 0, result.stderr
    order = list(dict.fromkeys((row["section"], row["task"]) for row in json.loads(out.read_text())["rows"]))
    tasks = ["fails", "dies", "spoils", "too large", "hangs"]
    assert order == [*(("first", task) for task in tasks), ("second", "good"), ("first", "good"), ("first", "late")]
    failures = {row["task"]: row["failure"] for row in json.loads(out.read_text())["rows"] if row.get("ok") is False}
    assert failures == {
        "fails": "RuntimeError: gone",
        "dies": "its process ended: SIGSEGV",
        "spoils": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "hangs": "no end after 2 s",
    }
    assert rows_of(out, "first", "too large")[-1]["not measured"] == "CUDA out of memory"
    pids = [rows_of(out, *key)[0].get("pid") for key in order]
    assert pids[0] == pids[1]
    assert len({pids[i] for i in (0, 2, 4, 5, 6)}) == 5  # after death, spoiling and hanging; of every section
    (good,) = rows_of(out, "first", "good")
    assert (good["earlier"], good["not a number"]) == (9, "nan")

    (tmp_path / "mended").touch()
    result = command(CASES, "failing", out, 1)
    assert "cases taken over: first 3, second 1. To be tried once more: 4." in result.stderr
    assert rows_of(out, "first", "good") == [good]
    assert [row["case"] for row in rows_of(out, "first", "fails")] == ["first half", "second half"]
    assert len(rows_of(out, "first", "hangs")) == 1
    assert rows_of(out, "first", "dies")[-1]["failure"] == "its process ended: SIGSEGV"


@pytest.mark.slow
def test_the_time_is_kept(command: Command, tmp_path: Path) -> None:
    """A case under way is ended with it, the rest says so, and another call goes on."""
    out = tmp_path / "r.json"
    result = command(CASES, "slow", out, 0.1, timeout=30)
    assert result.returncode == 0, result.stderr
    (good,) = rows_of(out, "first", "good")
    _, cut = rows_of(out, "first", "hangs")
    rest = [row for row in json.loads(out.read_text())["rows"] if row["case"] == "rest of the section"]
    assert sorted(row["section"] for row in rest) == ["first", "second"]
    assert {row["not measured"] for row in (cut, *rest)} == {"out of time"}

    (tmp_path / "mended").touch()
    result = command(CASES, "slow", out, 1, timeout=30)
    assert "cases taken over: first 1. To be tried once more: 0." in result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["section"], row["task"]) for row in rows] == [
        ("first", "good"), ("first", "hangs"), ("first", "after"), ("second", "good"),
    ]  # fmt: skip
    assert rows[0] == good


@pytest.mark.slow
def test_a_killed_benchmark_leaves_a_whole_file_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "r.json"

    def rows() -> Rows:
        return json.loads(out.read_text())["rows"] if out.exists() else []

    command = [sys.executable, str(CASES), "endless", str(out), "1"]
    with program(command, script_environment()) as running:
        assert eventually(lambda: len(rows()) > 100, 60)  # each of many looks finds it whole
        assert len(running.family()) > 1
        running.process.kill()
        assert running.gone(20)
    assert len(rows()) > 100
    record = Record.opened(out, {**json.loads(out.read_text())["machine"]})
    assert [row["case"] for row in record.rows] == ["a row"]
    assert record.done == [["first", "good"]]


def test_what_is_of_something_else_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    record = Record.opened(path, MACHINE)
    record.add("first", "case", {"case": "a row"})
    record.finish("first", "case")
    assert Record.opened(path, MACHINE).rows == [{"section": "first", "task": "case", "case": "a row"}]
    for key, value in (("device", "H200"), ("torch", "2.11.0"), ("sizes", "toy")):
        with pytest.raises(UserError, match=f"{key} {MACHINE[key]}, here {value}.*--again"):
            Record.opened(path, MACHINE | {key: value})
        assert not Record.opened(path, MACHINE | {key: value}, again=True).rows
    capsys.readouterr()
    other = Record.opened(path, MACHINE | {"source": "cd", "commit": "c2", "date": "2026-11-29"})
    assert "the code has changed since" in capsys.readouterr().err
    assert (other.machine["commit"], other.machine["date"]) == ("c1, then c2", "2026-11-28 and 2026-11-29")
    assert len(other.rows) == 1
    for text in ("", "{}", '{"machine": {}, "rows": [], "done": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match="no results of bench"):
            Record.opened(path, MACHINE)


def test_tables() -> None:
    rows: Rows = [
        {"section": "a", "task": "x", "case": "one | two", "ms": 1.23456, "ok": True},
        {"section": "a", "task": "y", "case": "three", "tokens/s": 123456.7, "failure": "RuntimeError:\n gone"},
        {"section": "b", "task": "z", "case": "four", "calls": 1000, "where": {"file.py:1": 2}},
    ]
    machine = MACHINE | {"command": "python tools/bench.py gpu"}
    assert tables({"machine": machine, "rows": rows}).splitlines() == [
        "### a", "", "2026-11-28, H100, commit c1; torch 2.13.0; `python tools/bench.py gpu`:", "",
        "| case | ms | ok | tokens/s | failure |", "| --- | --- | --- | --- | --- |",
        "| one \\| two | 1.235 | yes |  |  |", "| three |  |  | 123,457 | RuntimeError: gone |", "",
        "### b", "", "2026-11-28, H100, commit c1; torch 2.13.0; `python tools/bench.py gpu`:", "",
        "| case | calls | where |", "| --- | --- | --- |", '| four | 1,000 | {"file.py:1": 2} |',
    ]  # fmt: skip


# As profiles of ViTs on an H100 and an A100 name them.
NAMES = [
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"),
    (
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(cutlass_80::Params)",
        "matrix products",
        "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8",
    ),
    ("sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "matrix products", None),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasSplitKParams<float>)",
     "matrix products", "splitKreduce_kernel"),
    (
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel_traits<64, 128>, "
        "false>(pytorch_flash::Flash_bwd_params)",
        "attention",
        "flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel [pytorch_flash, Flash_bwd_kernel_traits]",
    ),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
     "attention", None),
    (
        "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, "
        "at::native::binary_internal::MulFunctor<float>>, std::array<char*, 3ul>>(int, float)",
        "normalization and elementwise",
        "vectorized_elementwise_kernel [BinaryFunctor, MulFunctor]",
    ),
    (
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::"
        "{lambda()#3}::operator()() const::{lambda(float)#1}>(int)",
        "copies and casts",
        "unrolled_elementwise_kernel [direct_copy_kernel_cuda]",
    ),
    (
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float, float const*)",
        "normalization and elementwise",
        "vectorized_layer_norm_kernel",
    ),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<Metadata<4>, FusedAdamMathFunctor<float>>()",
     "optimizer", "multi_tensor_apply_kernel [FusedAdamMathFunctor]"),
    ("triton_poi_fused_gelu_3", "normalization and elementwise", "triton_poi_fused_gelu_3"),
    ("_take_backward_kernel", "normalization and elementwise", "_take_backward_kernel"),
    ("Memcpy DtoD (Device -> Device)", "copies and casts", None),
    ("Memset (Device)", "copies and casts", None),
    ("aten::addmm", "matrix products", "aten::addmm"),
    ("aten::add", "normalization and elementwise", "aten::add"),
    ("aten::_to_copy", "copies and casts", "aten::_to_copy"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention", None),
    ("aten::view", "other", "aten::view"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "short"), NAMES, ids=range(len(NAMES)))
def test_kinds_and_names_of_kernels(name: str, kind: str, short: str | None) -> None:
    event = {"cat": "kernel", "name": name, "ts": 0.0, "dur": 1.0}
    (span,), _ = kernels.of_a_gpu([event])
    assert span.kind == kind
    assert short in (None, kernels.short(name))


def test_time_of_kernels_and_of_operators() -> None:
    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1}

    gpu = [
        event("kernel", "gemm", 0, 4),
        event("kernel", "copy", 3, 3),  # on a second stream
        event("kernel", "vectorized_elementwise", 10, 2),
        event("gpu_user_annotation", "optimizer", 9, 4),
        event("gpu_user_annotation", "step", 0, 20),
        event("cpu_op", "aten::mm", 0, 20),
    ]
    found, busy = kernels.of_a_gpu(gpu)
    assert [(span.kind, span.own) for span in found] == [
        ("matrix products", 4),
        ("copies and casts", 3),
        ("optimizer", 2),
    ]
    assert busy == 8

    cpu = [
        event("cpu_op", "aten::linear", 0, 10),
        event("cpu_op", "aten::t", 1, 2),
        event("cpu_op", "aten::transpose", 1.5, 1),
        event("cpu_op", "aten::addmm", 4, 5),
        event("cpu_op", "aten::add", 12, 1),
        event("user_annotation", "optimizer", 12, 3),
    ]
    found, busy = kernels.of_a_cpu(cpu)
    assert {span.name: (span.kind, span.own) for span in found} == {
        "aten::linear": ("matrix products", 3),
        "aten::t": ("other", 1),
        "aten::transpose": ("other", 1),
        "aten::addmm": ("matrix products", 5),
        "aten::add": ("optimizer", 1),
    }
    assert busy == 11


def test_a_precision_that_is_not_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = gpu.precision(gpu.TOY)
    told: Rows = []
    assert measured(case, torch.device("cpu"), [], told.append) == "done"
    real = gpu.Setting.of
    monkeypatch.setattr(gpu.Setting, "of", lambda self, *_: real(self, "engine.precision=fp32"))
    assert measured(case, torch.device("cpu"), [], told.append) == "done"
    assert [row["ok"] for row in told] == [True, False]


def test_the_settings_of_a_gpu_are_sound() -> None:
    """What no run at toy sizes sees: names that tell cases apart, and recipes that the configuration accepts."""
    sizes = gpu.FULL
    features = [setting for setting, _ in sizes.features]
    used = [*sizes.steps, *sizes.largest, *sizes.profile, *sizes.memory, *features, sizes.precision, sizes.waits]
    for setting in {s.name: s for s in used}.values():
        config = setting.of("engine.precision=bf16").config()
        assert f"batch {config.train.global_batch}" in setting.name
        assert ("compiled" in setting.name) == config.engine.compile
        assert ("recomputing all" in setting.name) == (config.engine.activation_checkpointing == "full")
        assert step_memory(config, check_world(config, 1)).total < 75 * 2**30  # what an H100 has
    for name, section in gpu.SECTIONS.items():
        cases = [case.name for case in section(sizes)]
        assert len(cases) == len(set(cases)), name
