"""What Triton makes of the branch's kernels for GPUs that are not here, as ViT-L and ViT-g call them in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from machine_code import AMD, CAPABILITIES, atomics, compiled, disassembled, nvidia, operations, spills

from lejepa_scale.model import branch_triton

TAKE, TAKE_BACKWARD = branch_triton._take_kernel, branch_triton._take_backward_kernel
GIVE, GIVE_BACKWARD = branch_triton._give_kernel, branch_triton._give_backward_kernel
NAMES = {TAKE: "take", TAKE_BACKWARD: "take_backward", GIVE: "give", GIVE_BACKWARD: "give_backward"}
KINDS = dict.fromkeys(("width", "tokens", "kept"), "i32") | {"eps": "fp32"} | dict.fromkeys(("index", "place"), "*i32")
FP32 = ("statistics", "scale", "of_weight", "of_bias", "of_gamma")
# Static instructions and registers of a thread, of 8 columns each: recorded 2026-11-28, Triton 3.7.1, width 1,024.
RECORDED = {
    (TAKE, 80): (210, 37), (TAKE, 90): (222, 32), (TAKE, 100): (208, 32),
    (TAKE_BACKWARD, 80): (358, 64), (TAKE_BACKWARD, 90): (377, 71), (TAKE_BACKWARD, 100): (367, 74),
    (GIVE, 80): (105, 30), (GIVE, 90): (113, 31), (GIVE, 100): (105, 30),
    (GIVE_BACKWARD, 80): (188, 48), (GIVE_BACKWARD, 90): (198, 40), (GIVE_BACKWARD, 100): (196, 44),
}  # fmt: skip


def built(kernel: Any, target: Any, width: int) -> Any:
    kinds = {name: "*fp32" if name in FP32 else KINDS.get(name, "*bf16") for name in kernel.arg_names}
    shape = branch_triton._shape(width)
    constants = {"WIDTH": shape["WIDTH"], "HAS_BIAS": True, "HAS_GAMMA": True}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return compiled(kernel, target, constants, kinds, shape["num_warps"])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", NAMES, ids=NAMES.values())
def test_kernels_stay_in_registers(tmp_path: Path, kernel: Any, capability: int) -> None:
    for width in (1024, 1536):
        lines, registers = disassembled(built(kernel, nvidia(capability), width), tmp_path)
        found = operations(lines)
        assert not spills(found)
        assert not atomics(found)  # sums in one order
        assert any(name.startswith("LDG.E.128") for name in found)  # eight columns at once
        threads = 32 * branch_triton._shape(width)["num_warps"]
        if kernel in (TAKE_BACKWARD, GIVE_BACKWARD) and width == 1024:  # all programs of a processor run at once
            assert registers * threads * branch_triton._WAVES <= 65536
        if width == 1024:
            assert (sum(found.values()), registers) == pytest.approx(RECORDED[kernel, capability], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", NAMES, ids=NAMES.values())
def test_kernels_compile_for_amd(kernel: Any) -> None:
    assert "s_endpgm" in built(kernel, AMD, 1024).asm["amdgcn"]
