"""Passes over the residual stream with stochastic depth: Triton's kernels, in its interpreter and on a GPU, against the same
in torch's operations and in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT, mostly_slow, on_a_gpu
from timm.layers import LayerNorm
from torch import Tensor, nn

from lejepa_scale.model import branch
from lejepa_scale.model.attention import Packing

ROW = Packing(((6, 5), (9, 3)))
CASES = list(product((True, False), (True, False), ("fp32", "bf16", "autocast")))  # layer scale, bias, precision


@contextmanager
def _by_kernels(chosen: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "_has_kernels", lambda x: chosen)
        yield


def a_branch(
    width: int, scaled: bool, bias: bool, precision: str, kernels: bool, device: str = "cpu", row: Packing = ROW
) -> list[Tensor]:
    """Output and gradients of norm, a linear layer and layer scale on a subset of the row; precision: or fp64."""
    generator = torch.Generator().manual_seed(0)
    norm, linear = LayerNorm(width, eps=1e-6), nn.Linear(width, width, bias=False)
    parameters = [norm.weight, linear.weight]
    if bias:
        parameters.append(norm.bias)
    else:
        norm.bias = None
    gamma = nn.Parameter(torch.empty(width)) if scaled else None
    parameters += [gamma] if gamma is not None else []
    inputs = [torch.empty(row.tokens, width) for _ in range(2)]
    for tensor in (*parameters, *inputs):
        values = torch.randn(tensor.shape, generator=generator)  # the same in every precision
        tensor.data = values.bfloat16().float() + 2 * (tensor is inputs[0])
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    for tensor in (*parameters, *inputs):
        tensor.data = tensor.data.to(device, dtype)
    x = inputs[0].requires_grad_()
    torch.manual_seed(1)
    two = branch.draw(row, [row.thinned(0.4)], torch.device("cpu"))[0]
    assert two is not None
    subset = branch.Subset(*(part.to(device) if isinstance(part, Tensor) else part for part in two[0]))
    with _by_kernels(kernels), torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
        own, past = branch.enter(x, subset, norm)
        out = branch.leave(past, linear(own), gamma, subset)
        return [out.detach(), *torch.autograd.grad(out, [x, *parameters], inputs[1])]


def compare(width: int, scaled: bool, bias: bool, precision: str, device: str = "cpu", row: Packing = ROW) -> None:
    """Same kinds of tensors from both, and the kernels' as near to the truth; in fp32 as near as rounding lets them be.
    The interpreter cuts bits off for bf16, where machine code rounds to the nearest (`cvt.rn`): twice the error."""
    usual_share = 1.1 if device == "cuda" else 2.5
    arguments = (width, scaled, bias)
    ours = a_branch(*arguments, precision, True, device, row)
    plain = a_branch(*arguments, precision, False, device, row)
    truth = a_branch(*arguments, "fp64", False, "cpu", row)
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        off, usual = (float((x.cpu().double() - exact).norm() / exact.norm()) for x in (a, b))
        assert off < max(usual_share * usual, 1e-6), (arguments, precision, off, usual)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_what_is_drawn_and_given_back(precision: str) -> None:
    """Against one masked sum over the whole row."""
    width, row = 8, Packing(((5, 2), (4, 3)))
    torch.manual_seed(2)
    two = branch.draw(row, [row, Packing(((3, 2), (1, 3)))], torch.device("cpu"))
    assert two[0] is None
    for subset in two[1] or ():
        taken, place = subset.taken.long(), subset.place.long()
        assert torch.equal(place[taken], torch.arange(9))
        assert (place >= 0).sum() == 9
        assert subset.scale.tolist() == pytest.approx([5 / 3] * 6 + [4.0] * 3)
    assert two[1] is not None
    dtype = torch.float64 if precision == "fp64" else torch.float32
    x = torch.randn(row.tokens, width, dtype=dtype, requires_grad=True)
    subset = two[1][0]
    own, past = branch.enter(x, subset, None)
    out = branch.leave(past, own.sin(), torch.full((width,), 3.0, dtype=dtype), subset)
    mask = torch.zeros(row.tokens, 1, dtype=dtype).index_add(0, subset.taken, subset.scale[:, None].to(dtype))
    expected = x + 3 * mask * x.sin()
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    found, wanted = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("stride", mostly_slow([1, 5], 5))
def test_in_the_interpreter(tmp_path: Path, stride: int) -> None:
    """In a process of its own, since Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    script = tmp_path / "interpret.py"
    script.write_text(
        "import os, sys\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests'), str(ROOT / 'tools')]!r}\n"
        "from test_branch import CASES, compare\n"
        f"for case in CASES[::{stride}]:\n"
        "    compare(48, *case)\n"
        "compare(1536, True, True, 'bf16')\n"
        "compare(3, False, True, 'fp32')\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


@on_a_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case: tuple[bool, bool, str]) -> None:
    compare(384, *case, device="cuda", row=Packing(((40, 257), (160, 50))))
