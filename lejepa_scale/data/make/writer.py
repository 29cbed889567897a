"""Samples to WebDataset tar shards: the same input gives the same bytes, and an interrupted run leaves no half shard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset as wds

from lejepa_scale.data.io.reader import WRITING
from lejepa_scale.errors import UserError
from lejepa_scale.progress import bar

_MARKER = "dataset.json"


@dataclass(frozen=True)
class Sample:
    """One image: its encoded bytes as they came, and its class, a number or a name, where known."""

    key: str
    extension: str
    image: bytes
    label: int | str | None = None


def is_written(out: Path, description: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` already holds this dataset. Raises UserError where it holds another, unless `overwrite`."""
    marker = out / _MARKER
    if overwrite or not marker.exists():
        if not overwrite and any(out.glob("*.tar")) and not (out / WRITING).exists():
            raise UserError(f"{out} holds tar files that this tool did not write; choose another --out.")
        return False
    try:
        written = json.loads(marker.read_bytes())["description"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{marker} is damaged, so that what lies in {out} is not known. Choose another --out, or replace it with "
            "--overwrite."
        ) from error
    if written == description:
        return True
    raise UserError(f"{out} holds another dataset ({marker}). Choose another --out, or replace it with --overwrite.")


def write_shards(
    samples: Iterable[Sample],
    out: Path,
    *,
    per_shard: int,
    total: int | None,
    classes: tuple[str, ...],
    description: dict[str, Any],
) -> list[Path]:
    """Write `shard-000000.tar`, ... and, last, dataset.json. Returns the shards."""
    out.mkdir(parents=True, exist_ok=True)
    (out / WRITING).touch()
    (out / _MARKER).unlink(missing_ok=True)
    for old in [*out.glob("shard-*.tar*"), *out.glob("*.index.npz"), *out.glob("labels.*.index.json")]:
        old.unlink(missing_ok=True)  # a sidecar is found twice
    shards: list[Path] = []
    writer: wds.TarWriter | None = None
    count = 0
    for sample in bar(f"writing {out}", samples, unit="image", total=total):
        if count % per_shard == 0:
            _close(writer, shards)
            shards.append(out / f"shard-{len(shards):06d}.tar")
            writer = wds.TarWriter(str(_partial(shards[-1])), mtime=0.0, user="root", group="root", mode=0o644)
        record: dict[str, Any] = {"__key__": sample.key, sample.extension: sample.image}
        if sample.label is not None:
            record["cls"] = str(sample.label).encode()
        assert writer is not None
        writer.write(record)
        count += 1
    _close(writer, shards)
    summary = {
        "count": count,
        "classes": list(classes),
        "shards": [shard.name for shard in shards],
        "description": description,
    }
    (out / _MARKER).write_text(json.dumps(summary, indent=1))
    (out / WRITING).unlink()
    return shards


def _partial(shard: Path) -> Path:
    return shard.with_name("writing-" + shard.name)


def _close(writer: wds.TarWriter | None, shards: list[Path]) -> None:
    if writer is not None:
        writer.close()
        _partial(shards[-1]).rename(shards[-1])
