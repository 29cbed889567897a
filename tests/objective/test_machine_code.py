"""What Triton makes of the kernels for GPUs that are not here: registers, memory accesses, instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from machine_code import (
    AMD,
    CAPABILITIES,
    atomics,
    compiled,
    disassembled,
    nvidia,
    on_the_fast_path,
    spills,
)

from lejepa_scale.objective import triton_kernels

KNOTS, PER_THREAD = 17, triton_kernels._TILE // 32
SUMS, GRADIENT = triton_kernels._sums_kernel, triton_kernels._gradient_kernel
CONSTANTS = {"DT": 3.0 / (KNOTS - 1), "KNOTS": KNOTS, "TILE": triton_kernels._TILE}
KINDS = {"rows": "i32", "samples": "i32"}
# Instructions for each projection where angles are small, of all 16 knots: 4 products and sums a knot, the sine and cosine,
# and in the sums the adding up over the threads. Recorded 2026-11-28, Triton 3.7.1.
RECORDED = {
    (SUMS, 80): 176.4, (SUMS, 90): 176.5, (SUMS, 100): 179.6,
    (GRADIENT, 80): 159.3, (GRADIENT, 90): 159.3, (GRADIENT, 100): 159.3,
}  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", [SUMS, GRADIENT], ids=["sums", "gradient"])
def test_kernels_stay_in_registers(tmp_path: Path, kernel: Any, capability: int) -> None:
    made = compiled(kernel, nvidia(capability), CONSTANTS, KINDS, warps=1)
    lines, registers = disassembled(made, tmp_path)
    operations = on_the_fast_path(lines)
    assert made.metadata.shared == 0
    assert registers <= 128  # 16 warps of one thread block each on a processor
    assert not spills(operations)
    assert not atomics(operations)  # sums in one order
    assert any(name.startswith("LDG.E.128") for name in operations)  # four samples at once
    assert sum(operations.values()) / PER_THREAD == pytest.approx(RECORDED[kernel, capability], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [SUMS, GRADIENT], ids=["sums", "gradient"])
def test_kernels_compile_for_amd(kernel: Any) -> None:
    assert "s_endpgm" in compiled(kernel, AMD, CONSTANTS, KINDS, warps=1).asm["amdgcn"]
