"""The colour operations as Triton kernels: the same numbers in Triton's interpreter and on a GPU, and the machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES, ROOT, on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from machine_code import AMD, CAPABILITIES, atomics, compiled, disassembled, nvidia, operations, spills

from lejepa_scale.config import Augment
from lejepa_scale.data.images import photometric, photometric_triton
from lejepa_scale.data.images.pixels import Pixels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STRONG = Augment(jitter=0.9, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5, blur=0.7, solarize=0.5)
PIXELS = Pixels(mean=(0.1, 0.5, 0.7), std=(0.3, 0.2, 0.4))


def test_in_the_interpreter() -> None:
    """In a process of its own, since Triton decides at import whether it interprets: the tests of the other ways, which
    compare with torchvision, and the next one here."""
    here = Path(__file__)
    tests = [here.with_name("test_augmentation.py"), f"{here}::{test_batches_of_any_shape.__name__}"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *map(str, tests)]
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=ROOT, env=interpreted, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def drawn(count: int) -> np.ndarray:
    """The first image goes through every operation."""
    rows = photometric.draw(np.random.default_rng(0).random((count, photometric.DRAWS)), STRONG)
    rows[:1, [photometric.FLIP, photometric.SOLARIZE]] = 1
    rows[:1, photometric.ORDER] = 16  # saturation, hue, brightness, contrast
    rows[:1, photometric.SIGMA] = 1.3
    return rows


@pytest.mark.parametrize("device", DEVICES[:1] if INTERPRETED else DEVICES[1:])
def test_batches_of_any_shape(device: str) -> None:
    """As the operations on whole batches give, and those for a CPU where the blur's reflection is no longer than the image.
    The largest has several sums of luma, each over several tiles, and for the interpreter's sake no blur."""
    small = ((0, 8, 8), (3, 1, 1), (3, 2, 3), (2, 1, 50), (4, 7, 7), (4, 9, 7))
    shapes = (*small, (2, 33, 70), (2, 70, 33), (1, 130, 131))
    for number, (count, height, width) in enumerate(shapes):
        images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        if number % 2:  # as bands of 16 bits arrive; and not contiguous
            images = torch.rand(count, 3, width, height).mul(255).mT
        before, rows = images.clone(), drawn(count)
        if height == 130:
            rows[:, photometric.SIGMA] = 0
        found = photometric_triton.fused(images.to(device), rows, PIXELS).cpu()
        assert images.equal(before)
        for way in (photometric._together, photometric._one_by_one)[: 2 if min(height, width) > 3 else 1]:
            torch.testing.assert_close(found, way(images, rows, PIXELS), atol=1e-4, rtol=0)


@on_a_gpu
def test_on_a_gpu_the_bits_are_the_same_every_time() -> None:
    images, rows = torch.randint(0, 256, (64, 3, 98, 98), dtype=torch.uint8).cuda(), torch.from_numpy(drawn(64))
    first = photometric.apply(images, rows)
    assert all(photometric.apply(images, rows).equal(first) for _ in range(10))


@pytest.mark.parametrize(
    ("device", "channels", "triton", "way"),
    [
        ("cuda", 3, True, "fused"),
        ("cuda", 4, True, "_together"),
        ("cuda", 3, False, "_together"),
        ("cpu", 3, True, "_one_by_one"),
        ("cpu", 4, True, "_together"),
    ],
)
def test_who_takes_which_images(
    device: str, channels: int, triton: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensors that hold nothing, which may say that they are on a GPU."""
    taken = []
    for owner, name in ((photometric, "_together"), (photometric, "_one_by_one"), (photometric_triton, "fused")):
        monkeypatch.setattr(owner, name, lambda x, *_, name=name: taken.append(name) or x.float())
    monkeypatch.setattr(photometric, "_has_triton", lambda: triton)
    with FakeTensorMode():
        images = torch.empty(2, channels, 8, 8, dtype=torch.uint8, device=device)
    photometric.apply(images, torch.from_numpy(drawn(2)))
    assert taken == [way]


LUMA, PIXEL, BLUR = (getattr(photometric_triton, f"_{name}_kernel") for name in ("luma", "pixel", "blur"))
TILE = {"TILE": photometric_triton._TILE}
# Constants, warps, and pixels or values of a thread.
CALLS: dict[Any, tuple[dict[str, int], int, int]] = {
    LUMA: (TILE, 4, photometric_triton._TILE // 128),
    PIXEL: ({**TILE, "PARTS": photometric_triton._PARTS}, 4, photometric_triton._TILE // 128),
    BLUR: ({"LANES": photometric_triton._LANES}, 2, photometric_triton._LANES // 64),
}
WHOLE = ("plane", "height", "width", "parts", "rows")  # arguments that are numbers
# Instructions of each, whichever operations an image goes through, for each pixel or value of a thread: of all operations
# once, as the four of jitter are one loop. The blur's are 56 a row and what comes before. Recorded 2026-11-28, Triton 3.7.1.
RECORDED = {
    (LUMA, 80): 119.0, (LUMA, 90): 120.3, (LUMA, 100): 111.5,
    (PIXEL, 80): 172.5, (PIXEL, 90): 172.5, (PIXEL, 100): 165.5,
    (BLUR, 80): 282, (BLUR, 90): 273, (BLUR, 100): 273,
}  # fmt: skip


def built(kernel: Any, target: Any, *, x: str = "*u8", constants: dict[str, int] | None = None, **options: bool) -> Any:
    own, warps, _ = CALLS[kernel]
    constants = {**own, **{name: value for name, value in (constants or {}).items() if name in kernel.arg_names}}
    kinds = {"x": x, **dict.fromkeys(WHOLE, "i32")}
    return compiled(kernel, target, constants, kinds, warps, **options)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", CALLS, ids=["luma", "pixel", "blur"])
def test_kernels_stay_in_registers(tmp_path: Path, kernel: Any, capability: int) -> None:
    made = built(kernel, nvidia(capability))
    lines, registers = disassembled(made, tmp_path)
    found = operations(lines)
    assert made.metadata.shared == (16 if kernel is LUMA else 0)  # a number of each warp
    assert registers <= 64  # 32 warps or more on a processor
    assert not spills(found)
    assert not atomics(found)  # sums in one order
    if kernel is PIXEL:
        assert found["STG.E.128"] == 6  # four values at once: three channels, blurred later or not
    assert sum(found.values()) / CALLS[kernel][2] == pytest.approx(RECORDED[kernel, capability], rel=0.05)


@pytest.mark.parametrize("kernel", CALLS, ids=["luma", "pixel", "blur"])
def test_kernels_compile_for_other_calls(kernel: Any) -> None:
    """Sides that are no multiples of 16, floats, and one pixel: Triton makes constants of arguments that are 1."""
    built(kernel, nvidia(90), x="*fp32", aligned=False)
    built(kernel, nvidia(90), constants=dict.fromkeys(WHOLE, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", CALLS, ids=["luma", "pixel", "blur"])
def test_kernels_compile_for_amd(kernel: Any) -> None:
    assert "s_endpgm" in built(kernel, AMD).asm["amdgcn"]
