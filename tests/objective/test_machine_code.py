"""What Triton makes of the kernels for GPUs that are not here: registers, memory accesses, instructions. Compiled ahead of
time by the assembler that comes with Triton."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")

from triton.compiler import ASTSource  # noqa: E402

from lejepa_scale.objective import triton_kernels  # noqa: E402

KNOTS, PER_THREAD = 17, triton_kernels._TILE // 32
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SUMS, GRADIENT = triton_kernels._sums_kernel, triton_kernels._gradient_kernel
# Instructions for each projection where angles are small, of all 16 knots: 4 products and sums a knot, the sine and cosine,
# and in the sums the adding up over the threads. Recorded 2026-11-28, Triton 3.7.1.
RECORDED = {
    (SUMS, 80): 176.4, (SUMS, 90): 176.5, (SUMS, 100): 179.6,
    (GRADIENT, 80): 159.3, (GRADIENT, 90): 159.3, (GRADIENT, 100): 159.3,
}  # fmt: skip


def compiled(kernel: Any, target: Any) -> Any:
    """As a call with 16-byte aligned fp32 tensors, whose sides are multiples of 16, compiles it."""
    constants = {"DT": 3.0 / (KNOTS - 1), "KNOTS": KNOTS, "TILE": triton_kernels._TILE}
    kinds = {"rows": "i32", "samples": "i32"} | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    signature = {name: kinds.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": 1})


def disassembled(made: Any, folder: Path) -> tuple[list[str], int]:
    """Machine code, an instruction or label a line, and the registers of a thread."""
    path = folder / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    said = [
        subprocess.run(words, check=True, capture_output=True, text=True).stdout
        for words in ([TOOLS / "nvdisasm", "-c", path], [TOOLS / "cuobjdump", "--dump-resource-usage", path])
    ]
    registers = re.search(r"REG:(\d+)", said[1])
    assert registers is not None
    return said[0].splitlines(), int(registers[1])


def on_the_fast_path(lines: list[str]) -> Counter[str]:
    """Operations that every thread goes through. Large angles are reduced by a piece of code of their own, around which a
    branch leads that is followed by the threads' coming together (BSYNC)."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line))}
    skipped = set[int]()
    for i, line in enumerate(lines):
        found = re.search(r"@!?U?P\d+ +BRA +`\((\.L_x_\d+)\)", line)
        if found and labels[found[1]] > i and any("BSYNC" in near for near in lines[labels[found[1]] :][:3]):
            skipped |= set(range(i + 1, labels[found[1]]))
    counts: Counter[str] = Counter()
    for i, line in enumerate(lines):
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*).*;", line)
        if found and i not in skipped and found[1] != "NOP":
            counts[found[1]] += 1
    return counts


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 100))]
)
@pytest.mark.parametrize("kernel", [SUMS, GRADIENT], ids=["sums", "gradient"])
def test_kernels_stay_in_registers(tmp_path: Path, kernel: Any, capability: int) -> None:
    made = compiled(kernel, compiler.GPUTarget("cuda", capability, 32))
    lines, registers = disassembled(made, tmp_path)
    operations = on_the_fast_path(lines)
    assert made.metadata.shared == 0
    assert registers <= 128  # 16 warps of one thread block each on a processor
    assert not [name for name in operations if name.startswith(("STL", "LDL"))]  # nothing spills
    assert not [name for name in operations if name.startswith(("ATOM", "RED."))]  # sums in one order
    assert any(name.startswith("LDG.E.128") for name in operations)  # four samples at once
    assert sum(operations.values()) / PER_THREAD == pytest.approx(RECORDED[kernel, capability], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [SUMS, GRADIENT], ids=["sums", "gradient"])
def test_kernels_compile_for_amd(kernel: Any) -> None:
    assert "s_endpgm" in compiled(kernel, compiler.GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
