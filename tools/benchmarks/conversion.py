"""Which encoder can become what, how exactly, and what it costs: every target of `lejepa convert` for one model of each
family, with weights that show an error (no part of it is near zero, as new layer scales are)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from benchmarks.measure import Row
from lejepa_scale.conversion import TARGETS, compare, convert, open_model
from lejepa_scale.errors import UserError


@dataclass(frozen=True)
class Family:
    """A small model of timm's. native: the class of transformers that holds it; None: refused."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    size: int = 64
    native: str | None = None
    exact: bool = False  # by that class, at every size


_SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}
FAMILIES = {
    "ViT, class token": Family("vit_tiny_patch16_224", {**_SMALL, "img_size": 64}, native="Dinov2Model"),
    "ViT, average pool": Family("vit_tiny_patch16_224", {**_SMALL, "img_size": 64, "global_pool": "avg"}),
    "ViT, average pool, fc_norm": Family(
        "vit_tiny_patch16_224", {**_SMALL, "img_size": 64, "global_pool": "avg", "fc_norm": True}
    ),
    "ViT, layer behind the pooling": Family("vit_tiny_patch16_224", {**_SMALL, "img_size": 64, "num_classes": 40}),
    "ViT, normalized queries": Family("vit_tiny_patch16_224", {**_SMALL, "img_size": 64, "qk_norm": True}),
    "ViT, no class token": Family(
        "vit_tiny_patch16_224", {**_SMALL, "img_size": 64, "class_token": False, "global_pool": "avg"}
    ),
    "DINOv2": Family("vit_small_patch14_dinov2", {**_SMALL, "img_size": 70}, 70, "Dinov2Model"),
    "DINOv2, registers": Family(
        "vit_small_patch14_reg4_dinov2", {**_SMALL, "img_size": 70}, 70, "Dinov2WithRegistersModel", exact=True
    ),
    "DINOv2 giant (SwiGLU)": Family("vit_giant_patch14_dinov2", {**_SMALL, "img_size": 70}, 70, "Dinov2Model"),
    "gigantic, no layer scale": Family("vit_gigantic_patch14_224", {**_SMALL, "img_size": 70}, 70, "ViTModel"),
    "DINOv3 (RoPE), average pool": Family("vit_small_patch16_dinov3", {**_SMALL, "img_size": 64}),
    "DINOv3 (RoPE), class token": Family(
        "vit_small_patch16_dinov3",
        {**_SMALL, "img_size": 64, "global_pool": "token"},
        native="DINOv3ViTModel",
        exact=True,
    ),
    "DINOv3 plus (SwiGLU, biases)": Family(
        "vit_small_plus_patch16_dinov3_qkvb",
        {**_SMALL, "img_size": 64, "global_pool": "token"},
        native="DINOv3ViTModel",
        exact=True,
    ),
    "EVA-02": Family("eva02_tiny_patch14_224", {**_SMALL, "img_size": 70}, 70),
    "ResNet": Family("resnet10t", {"num_classes": 0}),
    "ConvNeXt": Family("convnext_atto", {"num_classes": 0, "depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]}),
}


def written(family: Family, folder: Path) -> Path:
    """An export of it with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(family.name, **family.arguments)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "pos_embed" in name or "token" in name or "gamma" in name:
            parameter.data.normal_(0.3, 0.3)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    about = {
        "timm": json.dumps({"model_name": family.name, **family.arguments}),
        "mean": "[0.4, 0.5, 0.6]",
        "std": "[0.2, 0.25, 0.3]",
        "image_size": str(family.size),
        "channels": "3",
    }
    path = folder / "source.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, about)
    return path


def table(families: int | None = None) -> Iterator[Row]:
    """Target x family (the first so many): exact, exact at one size, or refused, with the largest difference at each."""
    for label, family in list(FAMILIES.items())[:families]:
        for kind in TARGETS:
            with tempfile.TemporaryDirectory() as folder:
                yield {"case": f"{label} -> {kind}", **_outcome(family, kind, Path(folder))}


def _outcome(family: Family, kind: str, folder: Path) -> Row:
    model, target = open_model(written(family, folder)), folder / f"target.{kind}"
    try:
        done = convert(model, target, kind)
        found = compare(model, target, kind, exact=done.exact, dtype=torch.float32)
    except UserError as error:
        expected = kind == "hf" and family.native is None
        return {"outcome": "refused", "reason": str(error), "ok": expected}
    largest: dict[tuple[int, int], float] = {}
    for row in found:
        largest[row.size] = max(largest.get(row.size, 0.0), row.pooled, row.patches or 0.0)
    sizes = ", ".join(f"{h} x {w}: {value:.0e}" for (h, w), value in largest.items())
    readers = "+".join(dict.fromkeys(row.reader for row in found))
    return {
        "outcome": "exact" if done.exact else "exact at one size",
        "by": _with_versions(readers),
        "differences": sizes,
    }


def _with_versions(readers: str) -> str:
    def numbered(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return name

    return ", ".join(numbered(name) for name in readers.split("+"))


def costs(source: Path, targets: list[str]) -> Iterator[Row]:
    """`lejepa convert` of a checkpoint as a program of its own: seconds, bytes, and memory over that of the imports."""
    imports = _run([sys.executable, "-c", "import timm, torch, lejepa_scale.conversion"])[1]
    for request in targets:
        kind, *options = request.split()
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "target"
            words = [sys.executable, "-m", "lejepa_scale", "convert", str(source), str(target), "--to", kind, *options]
            seconds, peak = _run(words)
            files = [file for file in Path(folder).rglob("*") if file.is_file()]
            yield {
                "case": request,
                "s": seconds,
                "GB": sum(file.stat().st_size for file in files) / 1e9,
                "files": len(files),
                "peak MiB over imports": (peak - imports) / 1024,
            }


_MEASURED = """import os, subprocess, sys, resource
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)"""


def _run(words: list[str]) -> tuple[float, int]:
    """Seconds, and KiB of resident memory at most."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _MEASURED, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words[3:])} ended with {done.returncode}.")
    return time.perf_counter() - began, int(done.stdout.split()[-1])
