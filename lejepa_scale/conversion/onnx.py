"""ONNX: pooled features and patch tokens for any number, height and width of images."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lejepa_scale.conversion.model import Model, outputs
from lejepa_scale.conversion.timm_folder import patch_size
from lejepa_scale.errors import UserError

INPUT, POOLED, TOKENS = "pixel_values", "pooled", "patch_tokens"
_LARGEST = 2_000_000_000  # bytes of weights in one file: a protocol buffer has no more than 2 GiB


class _Outputs(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        pooled, patches = outputs(self.backbone, pixel_values)
        if patches is None:
            raise UserError("it has no single map of features at its end, which patch_tokens would be")
        return pooled, patches


def _with_sizes_kept(backbone: Any) -> None:
    """DINOv3's rotary positions divide by the sides of the grid, which torch's exporter makes numbers of the example's: the
    same again, with sides that are counted."""
    rope: Any = getattr(backbone, "rope", None)
    if type(rope).__name__ != "RotaryEmbeddingDinoV3":
        return

    def embed(shape: Any, *_: Any, **__: Any) -> Tensor:
        sides = []
        for side in shape:
            index = torch.arange(side, dtype=torch.float32)
            sides.append((index + 0.5) / (index[-1:] + 1) * 2 - 1)
        grid = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)  # [H W, 2]
        angles = 2 * torch.pi * grid[:, :, None] / rope.periods.float()
        angles = angles.flatten(1)
        angles = torch.cat([angles, angles], 1) if rope.rotate_half else angles.repeat_interleave(2, -1)
        return torch.cat([angles.sin(), angles.cos()], 1)

    own = rope.get_embed([3, 5])
    same = torch.allclose(embed([3, 5]), own, atol=1e-6)
    if not same:
        raise UserError("the rotary positions of this encoder cannot be exported to ONNX for every size.")
    rope.get_embed = embed


def write(model: Model, path: Path, dtype: torch.dtype) -> None:
    """Write the file; PATH.data with the weights beside it where they are too many for one. Raises UserError where
    onnxscript is not installed, or torch cannot export the model."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--to onnx needs onnxscript (and onnxruntime for --verify): pip install 'lejepa_scale[onnx]'."
        ) from error
    backbone: Any = model.build().to(dtype)
    _with_sizes_kept(backbone)
    size, step = model.inputs.image_size, patch_size(model.shapes) or 32
    dynamic = bool(model.arguments.get("dynamic_img_size")) or not hasattr(model.shapes, "patch_embed")
    example = torch.zeros(2, model.inputs.channels, size, size + step if dynamic else size, dtype=dtype)
    axes: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    if dynamic:
        axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    outside = sum(t.numel() * t.element_size() for t in backbone.state_dict().values()) > _LARGEST
    try:
        with _quietly():
            program: Any = torch.onnx.export(
                _Outputs(backbone).eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=(axes,),
                input_names=[INPUT],
                output_names=[POOLED, TOKENS],
                optimize=True,
            )
            program.save(path, external_data=outside)
    except Exception as error:  # of torch.export, onnxscript and the operators they do not know
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"torch cannot export {model.architecture} to ONNX: {reason}.") from error


@contextlib.contextmanager
def _quietly() -> Any:
    """torch tells of every stage, on both streams."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
