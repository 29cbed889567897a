"""Every way of computing characteristic-function sums against the textbook form, and what it costs in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, mostly_slow, on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from lejepa_scale.cpu import compiler
from lejepa_scale.objective import SIGReg, characteristic, cpu_kernels
from lejepa_scale.objective.characteristic import fused_sums, has_triton, reference_sums

KNOTS = (2, 3, 5, 17, 18, 33)


def errors(
    backend: str, knots: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[float, float]:
    """Largest differences from the textbook form in float64: of means over samples, and of gradients over the largest."""
    views, samples, width, slices = shape
    z = torch.randn(views, samples, width, dtype=torch.float64, requires_grad=True)
    a = torch.randn(slices, width, dtype=torch.float64) / width**0.5
    true = reference_sums(z, a, 0.1875, knots)
    weights = torch.randn_like(true)
    (true_gradient,) = torch.autograd.grad(true, z, weights)
    x = z.detach().to(device, dtype).requires_grad_()
    found = fused_sums(x, a.to(device, dtype), 0.1875, knots, backend)
    (gradient,) = torch.autograd.grad(found, x, weights.to(device, dtype))
    found, gradient = found.cpu(), gradient.cpu()
    if not samples:
        assert not found.any()
        return 0.0, 0.0
    gradient_error = (gradient - true_gradient).abs().max() / true_gradient.abs().max()
    return float((found - true).detach().abs().max()) / samples, float(gradient_error)


@pytest.mark.parametrize("knots", KNOTS)
@pytest.mark.parametrize("shape", [(3, 50, 7, 33), (1, 1, 1, 1), (2, 0, 3, 4), (1, 70_000, 2, 3), (1, 5000, 2, 70)])
def test_eager_equals_the_textbook_form(knots: int, shape: tuple[int, int, int, int]) -> None:
    assert max(errors("fused", knots, shape, torch.float64)) < 1e-12
    assert max(errors("fused", knots, shape, torch.float32)) < 1e-5


@pytest.mark.parametrize("knots", KNOTS)
@pytest.mark.parametrize(
    "shape", [(3, 50, 7, 33), (1, 1, 1, 1), (2, 0, 3, 4), (1, 64, 3, 2), (1, 70_000, 2, 3), (1, 5000, 2, 70)]
)
def test_native_kernels_equal_the_textbook_form(knots: int, shape: tuple[int, int, int, int]) -> None:
    """Built here and now: CI has a C++ compiler."""
    assert max(errors("native", knots, shape, torch.float64)) < 1e-12
    assert max(errors("native", knots, shape, torch.float32)) < 1e-5


@pytest.mark.parametrize("largest", [1.0, 50.0, 8000.0, 9000.0, 1e6])
def test_native_sines_are_accurate_at_any_angle(largest: float) -> None:
    """Rows of one sample are cosine and sine themselves; beyond 8192 the C library computes them."""
    x = (torch.rand(100_000, 1) * 2 - 1) * largest
    found = cpu_kernels.sums(x, 1.0, 2).squeeze(1).double()
    true = torch.stack([x.double().cos(), x.double().sin()]).squeeze(-1)
    assert float((found - true).abs().max()) < 1.5e-7


def test_native_kernels_are_built_once_and_by_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "import torch; from lejepa_scale.objective import cpu_kernels; cpu_kernels.sums(torch.ones(2, 3), 1.0, 4)"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [p.wait(120) for p in processes] == [0, 0]
    (built,) = (tmp_path / "lejepa_scale/kernels").glob("*.so")
    before = built.stat().st_mtime_ns
    assert compiler.build(cpu_kernels.KERNELS.source, "float") == built
    assert built.stat().st_mtime_ns == before


def test_without_a_compiler_the_eager_code_runs_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "which", lambda name: None)
    cpu_kernels.KERNELS._loaded.clear()
    z = torch.randn(30, 4)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        value = SIGReg(num_slices=8)(z, step=0)
    cpu_kernels.KERNELS._loaded.clear()
    torch.testing.assert_close(value, SIGReg(num_slices=8, backend="fused")(z, step=0))


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("stride", mostly_slow([1, 3], 3))
def test_triton_kernels_equal_the_textbook_form_in_the_interpreter(tmp_path: Path, stride: int) -> None:
    """In a process of its own, since Triton decides at import whether it interprets."""
    script = tmp_path / "interpret.py"
    script.write_text(
        "import os, sys\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests'), str(ROOT / 'tools')]!r}\n"
        "import torch\n"
        "from test_characteristic import KNOTS, errors\n"
        f"for knots in KNOTS[::{stride}]:\n"
        "    for shape in ((2, 1, 3, 5), (2, 700, 3, 5), (1, 512, 3, 2), (2, 0, 3, 4)):\n"
        "        assert max(errors('triton', knots, shape, torch.float64)) < 1e-12, (knots, shape)\n"
        "        assert max(errors('triton', knots, shape, torch.float32)) < 1e-5, (knots, shape)\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


@on_a_gpu
@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_on_a_gpu_the_sums_are_the_textbook_forms(backend: str) -> None:
    for knots in (2, 17):  # every kind of argument is compiled anew
        for shape in ((3, 50, 7, 33), (1, 1, 1, 1), (2, 0, 3, 4), (1, 70_000, 2, 3), (1, 5000, 64, 512)):
            assert max(errors(backend, knots, shape, torch.float64, "cuda")) < 1e-12, (knots, shape)
            assert max(errors(backend, knots, shape, torch.float32, "cuda")) < 1e-5, (knots, shape)


def _peak(backend: str, samples: int) -> int:
    from benchmarks.measure import peak_bytes  # not known to the process with the interpreter

    z = torch.randn(samples, 32, requires_grad=True)
    sigreg = SIGReg(num_slices=256, backend=backend)
    return peak_bytes(lambda: torch.autograd.grad(sigreg(z, step=0), z), z.device)


def test_memory_is_two_projections_or_little_more() -> None:
    """N x M floats, the gradient and blocks: against 3 x 16 times N x M for the textbook form."""
    samples = 16384
    projections = 4 * samples * 256
    for backend, limit in (("fused", 2.3), ("native", 2.0)):
        peak = _peak(backend, samples)
        assert peak < limit * projections, (backend, peak / projections)
    assert _peak("reference", samples // 8) > 30 * projections / 8


@pytest.mark.traced
def test_no_graph_break_under_compile() -> None:
    """fullgraph raises where torch.compile would break the graph; the directions still follow the step."""
    sigreg = SIGReg(num_slices=8)
    z = torch.randn(20, 6, dtype=torch.float64)
    whole = torch.compile(lambda x, step: sigreg(x, step=step), fullgraph=True, backend="aot_eager")
    for step in (0, 1, 7):
        x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
        value, expected = whole(x, step), sigreg(y, step=step)
        value.backward()
        expected.backward()
        torch.testing.assert_close((value, x.grad), (expected, y.grad))


@pytest.mark.unchecked
def test_products_in_tf32_are_asked_for_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that say they are on a GPU: what torch is set to during each product, and after an error."""
    products, product, seen = torch.backends.cuda.matmul, torch.bmm, []
    before = products.fp32_precision
    monkeypatch.setattr(torch, "bmm", lambda x, y: seen.append(products.fp32_precision) or product(x, y))
    with FakeTensorMode():
        x = torch.empty(1, 4, 4, device="cuda")
        for tf32, of in ((False, x), (True, x), (True, torch.empty(1, 4, 4))):
            characteristic._product(of, of, tf32)
            assert products.fp32_precision == before
        with pytest.raises(RuntimeError):
            characteristic._product(x, torch.empty(1, 5, 4, device="cuda"), True)
    assert seen == [before, "tf32", before, "tf32"]
    assert products.fp32_precision == before


@on_a_gpu
def test_on_a_gpu_tf32_changes_little() -> None:
    z = torch.randn(1, 8192, 256, generator=torch.Generator().manual_seed(0)).cuda()
    exact, found = (float(SIGReg(num_slices=1024, tf32=tf32)(z, step=0)) for tf32 in (False, True))
    assert exact != found
    assert found == pytest.approx(exact, rel=1e-4)
