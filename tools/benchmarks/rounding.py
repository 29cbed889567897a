"""What numbers of fewer bits change, on any machine: SIGReg whose products are rounded to TF32, and linear layers in float8.
Both are rounded as a GPU rounds them, and multiplied in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from benchmarks.measure import Results, Row, run_sections
from lejepa_scale.errors import UserError
from lejepa_scale.objective import SIGReg, characteristic

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def as_tf32(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Rounded to 10 bits of mantissa, half away from zero: PTX's cvt.rna.tf32.f32, by which cuBLAS's kernels convert."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _product(x: Float[Tensor, "v i j"], y: Float[Tensor, "v j k"], tf32: bool) -> Float[Tensor, "v i k"]:
    return torch.bmm(as_tf32(x.contiguous()), as_tf32(y.contiguous())) if tf32 else torch.bmm(x, y)


def measure(smoke: bool) -> Results:
    """Both tables."""
    samples, slices, side = (256, 64, 128) if smoke else (8192, 1024, 1024)
    sections = {"tf32": tf32_rows(samples, slices), "float8": float8_rows(side)}
    return run_sections(sections, torch.device("cpu"), minutes=60)


def tf32_rows(samples: int, slices: int) -> Iterator[Row]:
    """Relative changes of the statistic and of its gradient (relative norm of the difference, and cosine)."""
    for width in (64, 256, 512):
        for name, z in embeddings(samples, width).items():
            exact, of_exact = _with_gradient(z, slices, tf32=False)
            found, of_found = _with_gradient(z, slices, tf32=True)
            yield {
                "case": f"{name}, N={samples}, D={width}, M={slices}",
                "statistic": exact,
                "changes by": abs(found / exact - 1),
                "gradient changes by": float((of_found - of_exact).norm() / of_exact.norm()),
                "cosine": float(nn.functional.cosine_similarity(of_found.double(), of_exact.double(), 0)),
            }


def embeddings(samples: int, width: int) -> dict[str, Float32[Tensor, "{samples} {width}"]]:
    """As they are at the end of training, on the way there, and where it went wrong."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(samples, width, generator=generator)
    spectrum = torch.arange(1, width + 1) ** -1.0
    return {
        "isotropic": z,
        "half as wide": z / 2,
        "decaying spectrum": z * spectrum.sqrt() * (width / spectrum.sum()).sqrt(),
        "far from 0": z + 3,
        "heavy tails": z * (2 / torch.randn(samples, 1, generator=generator).abs().clamp_min(0.1)).clamp_max(10),
    }


def _with_gradient(z: Tensor, slices: int, *, tf32: bool) -> tuple[float, Tensor]:
    """On the branch of the backward pass that a GPU takes."""
    own = z[None].clone().requires_grad_()
    sigreg = SIGReg(num_slices=slices, backend="fused", tf32=tf32)
    with (
        patch.object(characteristic, "_product", _product),
        patch.object(characteristic, "_in_blocks", lambda _: False),
    ):
        value = sigreg(own, step=0)
        value.backward()
    assert own.grad is not None
    return float(value.detach()), own.grad.flatten()


def float8_rows(side: int) -> Iterator[Row]:
    """Relative errors (norm of the difference to float64) of a linear layer's output and gradients, by torchao's recipe."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError("bench.py rounding needs torchao: pip install 'lejepa_scale[gpu]'.") from error
    for name, (x, grad) in _activations(side).items():
        weight = (0.02 * torch.randn(side, side, generator=torch.Generator().manual_seed(1))).bfloat16()
        truth = x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double()
        for recipe in (None, *RECIPES):
            layer = nn.Sequential(nn.Linear(side, side, bias=False, dtype=torch.bfloat16))
            layer[0].weight.data = weight.clone()
            if recipe is not None:
                config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
                convert_to_float8_training(layer, config=config)
            own = x.clone().requires_grad_()
            out = layer(own)
            out.backward(grad)
            found = out.detach(), own.grad, layer[0].weight.grad
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
            # of a typical row, which a few large ones do not hide
            usual = [
                float(((a.double() - b).norm(dim=1) / b.norm(dim=1)).median())
                for a, b in zip(found, truth, strict=True)
            ]
            yield {
                "case": f"{name}, {recipe or 'bf16'}",
                **dict(zip(("output", "input's gradient", "weight's gradient"), errors, strict=True)),
                **dict(zip(("output, median row", "input's, median row", "weight's, median row"), usual, strict=True)),
            }


def _activations(side: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs' gradients, as they are in vision transformers: some have channels or tokens of huge values."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(side, side, generator=generator), 1e-4 * torch.randn(side, side, generator=generator)
    channels, tokens, of_tokens = x.clone(), x.clone(), grad.clone()
    channels[:, :4] *= 1e4
    tokens[:4] *= 1e4
    of_tokens[:4] *= 1e4
    cases = {
        "normal": (x, grad),
        "4 channels 10,000 times": (channels, grad),
        "4 tokens 10,000 times": (tokens, of_tokens),
    }
    return {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in cases.items()}
