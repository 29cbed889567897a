"""Whether a converted encoder gives the features of its source, at several sizes, loaded as its users load it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torchvision.transforms.functional import resize

from lejepa_scale.checkpoint.tensors import TensorFile
from lejepa_scale.conversion import native_folder, onnx
from lejepa_scale.conversion.model import HEADS, Features, Model, outputs
from lejepa_scale.conversion.timm_folder import patch_size
from lejepa_scale.errors import UserError

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest feature
_MOST = 1e-2  # of what an encoder's own sensitivity allows
_PERTURBED = 1e-6  # of an image's values, as rounding within the encoder may
_ZERO = 1e-30  # features that all are, differ by none


@dataclass(frozen=True)
class Difference:
    """The largest difference of features by one reader at one size, as a share of the largest. None: not compared."""

    reader: str
    images: str
    size: tuple[int, int]
    pooled: float
    patches: float | None
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        patches = "" if self.patches is None else f", patch tokens {self.patches:.1e}"
        mark = "" if self.passed else " DIFFERS"
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.reader}, {self.images} images of {self.size[0]} x {self.size[1]}: pooled {self.pooled:.1e}{patches}"
            f"{mark}{note}"
        )


@dataclass(frozen=True)
class _Case:
    """What the source makes of images, and how much others may differ from it."""

    label: str
    images: Tensor
    pooled: Tensor
    patches: Tensor | None
    tolerance: float

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[3]


def compare(
    model: Model, target: Path, kind: str, *, exact: bool, dtype: torch.dtype, real: Tensor | None = None
) -> list[Difference]:
    """Every reader of the target against the source at the native size, a smaller, a larger and a non-square one. exact: at
    every size, else at the native one alone. real: standardized images [B, C, S, S]. The source and the readers are in
    memory one after another. Raises UserError where they differ, or a feature is no number, after all were compared."""
    cases, found = _of_source(model, real, _TOLERANCE[dtype]), list[Difference]()
    native = (model.inputs.image_size,) * 2
    for name, load in _readers(target, kind, dtype):
        gc.collect()  # what came before
        reader = load()
        for case in cases:
            with torch.inference_mode():
                pooled, patches = reader(case.images)
            found.append(_compared(name, case, pooled, patches, anywhere=exact or case.size == native))
        del reader
    if wrong := [difference for difference in found if not difference.passed]:
        raise UserError(f"{target} differs from {model.where}: {'; '.join(map(str, wrong[:4]))}.")
    if not found:
        raise UserError(f"{model.where} takes no image of {model.inputs.image_size} pixels: nothing was compared.")
    return found


def _of_source(model: Model, real: Tensor | None, tolerance: float) -> list[_Case]:
    features, cases = model.features(), list[_Case]()
    for label, images in _images(model, real):
        try:
            with torch.inference_mode():
                pooled, patches = features(images)
                least = 10 * _sensitivity(features, images, (pooled, patches))
        except Exception:  # the encoder itself takes one size alone; timm's classes say so by many errors
            continue
        cases.append(_Case(label, images, pooled, patches, max(tolerance, min(_MOST, least))))
    return cases


def _compared(name: str, case: _Case, pooled: Tensor, patches: Tensor | None, *, anywhere: bool) -> Difference:
    """anywhere: the target must be equal at this size."""
    of_pooled = _difference(case.pooled, pooled)
    of_patches = None if patches is None or case.patches is None else _difference(case.patches, patches)
    differences = [of_pooled] if of_patches is None else [of_pooled, of_patches]
    close = all(difference <= case.tolerance for difference in differences)  # NaN is no agreement
    elsewhere = not anywhere and all(difference == difference for difference in differences)
    note = "" if close or not elsewhere else "exact at its native size alone: positions are interpolated otherwise"
    return Difference(name, case.label, case.size, of_pooled, of_patches, close or elsewhere, note)


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("nan")
    return float((expected - found.float()).abs().max() / expected.abs().max().clamp_min(_ZERO))


def _sensitivity(features: Features, images: Tensor, wanted: tuple[Tensor, Tensor | None]) -> float:
    """How much the source's own features change where its input does by a rounding: no other program can be closer. Of
    trained encoders far less than the tolerance; deep ones of large random weights amplify it a hundredfold."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    changed = features(images * (1 + _PERTURBED * noise))
    pairs = [(a, b) for a, b in zip(wanted, changed, strict=True) if a is not None and b is not None]
    found = max(_difference(a, b) for a, b in pairs)
    return found if found == found else 0.0


def _images(model: Model, real: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    size, step = model.inputs.image_size, patch_size(model.shapes) or 32
    less = max(step, round(0.7 * size / step) * step)
    more = round(1.4 * size / step) * step
    generator = torch.Generator().manual_seed(0)
    for height, width in dict.fromkeys([(size, size), (less, less), (more, more), (size, less)]):
        yield "random", torch.randn(2, model.inputs.channels, height, width, generator=generator)
        if real is not None:
            yield "real", resize(real, [height, width], antialias=True)


# -- readers


def _readers(target: Path, kind: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Features]]]:
    """What loads a target, of the libraries that are here."""
    if kind == "timm":
        yield "timm", partial(_by_timm, target)
        classes = json.loads((target / "config.json").read_text())["num_classes"]
        if find_spec("transformers") and not classes:  # which leaves the layer behind the pooling out
            yield "transformers", partial(_wrapped, target)
    elif kind == "safetensors":
        yield "timm", partial(_rebuilt, target)
    elif kind == "hf":
        if not find_spec("transformers"):
            raise UserError("--verify of --to hf needs transformers: pip install 'lejepa_scale[hf]'.")
        yield "transformers", partial(native_folder.features_of, target)
    elif kind == "onnx":
        if not find_spec("onnxruntime"):
            raise UserError("--verify of --to onnx needs onnxruntime: pip install 'lejepa_scale[onnx]'.")
        yield "onnxruntime", partial(_session, target, dtype)


def _by_timm(target: Path) -> Features:
    model: Any = timm.create_model(f"local-dir:{target}", pretrained=True).float().eval()
    return lambda images: outputs(model, images)


def _wrapped(target: Path) -> Features:
    loaded = native_folder.load(target, "AutoModel")
    return lambda images: outputs(loaded.timm_model, images)


def _session(target: Path, dtype: torch.dtype) -> Features:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> tuple[Tensor, Tensor | None]:
        given = {onnx.INPUT: images.to(dtype).numpy()}
        pooled, patches = (torch.from_numpy(array) for array in session.run([onnx.POOLED, onnx.TOKENS], given))
        return pooled, patches

    return features


def _rebuilt(target: Path) -> Features:
    """As the card says: by what the file itself says."""
    files = sorted(target.glob("*.safetensors")) if target.is_dir() else [target]
    tensors, about = dict[str, Tensor](), dict[str, str]()
    for path in files:
        file = TensorFile(path)
        about |= file.metadata
        tensors |= {name: file.tensor(name) for name in file.keys() if not name.startswith(HEADS)}
    built: Any = timm.create_model(**json.loads(about["timm"])).eval()
    built.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    )
    return lambda images: outputs(built, images)
