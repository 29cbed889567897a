"""Features of images in a file, for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lejepa_scale.checkpoint import Weights
from lejepa_scale.checkpoint.places import Place
from lejepa_scale.conversion import Given
from lejepa_scale.data.images.pixels import Ranges
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation.cache import Cache
from lejepa_scale.evaluation.features import POOLED, Extracted, Kind
from lejepa_scale.evaluation.subjects import subjects
from lejepa_scale.evaluation.suite import keys_of_subject
from lejepa_scale.evaluation.work import Work, device_of, indexed

ENDINGS = (".safetensors", ".parquet")


def embed(
    what: Place | str,
    images: str | Sequence[str],
    *,
    kinds: Sequence[str] = (POOLED.name,),
    batch: int = 256,
    device: torch.device | str | None = None,
    image_size: int | None = None,
    given: Given | None = None,
    weights: Weights = "best",
    value_range: Ranges | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    cache: Path | None = None,
) -> Extracted:
    """Features of every image in stored order, with labels (-1 where there is none) and the samples' names. Arguments are as
    those of `evaluate`. Raises UserError as it does."""
    (subject,) = subjects(
        what, given=given, weights=weights, image_size=image_size, value_range=value_range, beside=False
    )
    keys = keys_of_subject(subject, image_key, label_key)
    sets, numbers = indexed({"images": images}, keys)
    chosen = [Kind(name) for name in dict.fromkeys(kinds)]
    work = Work(sets, numbers, batch, device_of(device), chosen, Cache(cache))
    return work.features(subject)["images"]


def check_target(path: Path, overwrite: bool) -> None:
    """Before any work. Raises UserError for a file that is there, and for an ending that is none of ENDINGS."""
    if path.suffix not in ENDINGS:
        raise UserError(f"--out {path}: features are written as {' or '.join(ENDINGS)}.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already: name another --out, or add --overwrite.")
    if path.suffix == ".parquet":
        _arrow()


def write(features: Extracted, path: Path) -> None:
    """Whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".parquet":
        arrow, parquet = _arrow()
        columns: dict[str, Any] = {"key": features.keys, "label": features.labels.numpy()}
        for kind, rows in features.rows.items():
            flat = arrow.array(np.ascontiguousarray(rows.numpy()).reshape(-1))
            columns[kind] = arrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])
        parquet.write_table(arrow.table(columns), part)
    else:
        text = "".join(f"{key}\n" for key in features.keys).encode(errors="surrogateescape")
        keys = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
        tensors = {kind: rows.contiguous() for kind, rows in features.rows.items()}
        save_file({**tensors, "labels": features.labels, "keys": keys}, part, {"format": "pt"})
    part.rename(path)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("a .parquet file needs pyarrow: pip install pyarrow, or write a .safetensors file.") from error
    return pyarrow, pyarrow.parquet
