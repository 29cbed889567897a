"""What Triton makes of a kernel for GPUs that are not here, ahead of time: registers and instructions, by the assembler that
comes with it. Imported only where Triton is installed."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CAPABILITIES = [90, *(pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 100))]
AMD = GPUTarget("hip", "gfx942", 64)


def nvidia(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, 32)


def compiled(
    kernel: Any, target: GPUTarget, constants: dict[str, Any], kinds: dict[str, str], warps: int, aligned: bool = True
) -> Any:
    """As a call compiles it whose tensors are 16-byte aligned, and whose whole numbers are multiples of 16 if `aligned`.
    kinds: types of the arguments in Triton's words; one that is not named is a tensor of fp32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in names}
    divisible = [
        name for name, kind in signature.items() if kind.startswith("*") or (aligned and name not in constants)
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=target, options={"num_warps": warps})


def disassembled(made: Any, folder: Path) -> tuple[list[str], int]:
    """Machine code, an instruction or label a line, and the registers of a thread."""
    path = folder / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    said = [
        subprocess.run(words, check=True, capture_output=True, text=True).stdout
        for words in ([_TOOLS / "nvdisasm", "-c", path], [_TOOLS / "cuobjdump", "--dump-resource-usage", path])
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
    return operations([line for i, line in enumerate(lines) if i not in skipped])


def operations(lines: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in lines:
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*).*;", line)
        if found and found[1] != "NOP":
            counts[found[1]] += 1
    return counts


def spills(counts: Counter[str]) -> list[str]:
    """Operations on memory that stands in for registers."""
    return [name for name in counts if name.startswith(("STL", "LDL"))]


def atomics(counts: Counter[str]) -> list[str]:
    """Operations whose sums depend on the order in which threads come."""
    return [name for name in counts if name.startswith(("ATOM", "RED."))]
