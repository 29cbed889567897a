"""The files that an index lies in: a sidecar per shard, a manifest per folder of shards. Both are checked when they are
read; what is cut, altered or of another version is as good as absent."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lejepa_scale.addresses import is_remote
from lejepa_scale.config.paths import user_cache
from lejepa_scale.data.index.passed import PassedOver
from lejepa_scale.data.index.scan import BLOCK, NO_IMAGE, ShardIndex
from lejepa_scale.data.io import npy
from lejepa_scale.data.io.address import identity, shard_name
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)

_VERSION = 2
WORDS = -1  # in place of a number of classes: labels are words
MANIFEST_ROW = np.dtype(
    [("count", "<i8"), ("labelled", "<i8"), ("classes", "<i8"), ("nbytes", "<i8"), ("digest", "S32")]
)


def row_of(index: ShardIndex) -> np.void:
    """What a manifest says of a shard, a MANIFEST_ROW. classes: 1 + the largest label, or WORDS."""
    labels = index.labels
    classes = WORDS if index.words is not None else int(labels.max()) + 1
    rows = np.zeros(1, MANIFEST_ROW)
    rows[0] = (len(index), int((labels >= 0).sum()), classes, index.nbytes, index.digest.encode())
    return rows[0]


class IndexLocation:
    """Where the index files of one folder of shards lie: beside them, or in a folder of our own where that cannot be
    written. With `index_dir` they are written there alone. `mark`: SampleKeys'."""

    def __init__(self, folder: str, index_dir: Path | None, reader: Reader, mark: str = "") -> None:
        address = identity(folder) if is_remote(folder) else str(Path(folder).absolute())
        mirror = hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
        beside = [] if folder == "pipe:" else [folder]
        self.option = f" --out {shlex.quote(str(index_dir))}" if index_dir else ""  # of commands, for messages
        self.folder, self.reader, self._ending = folder, reader, f"{mark and '.'}{mark}.index"
        if index_dir is not None:
            self.places, self.written = [str(index_dir / mirror), *beside], [str(index_dir / mirror)]
        else:
            self.places = self.written = [*beside, str(user_cache() / "index" / mirror)]

    def _candidates(self, name: str) -> Iterator[bytes]:
        """The contents of every file of that name, nearest first."""
        for place in self.places:
            if (data := self.reader.get(f"{place}/{name}")) is not None:
                yield data

    def _write(self, name: str, data: bytes) -> None:
        if not any(self.reader.put(f"{place}/{name}", data) for place in self.written):
            raise UserError(
                f"cannot write the index of {self.folder} to {' or '.join(self.written)}. "
                "Set data.index_dir (`lejepa shards index --out`) to a folder that can be written and every node sees."
            )

    def sidecar(self, url: str, row: np.void | None = None) -> ShardIndex | None:
        """The sound sidecar of a shard, the one that `row` of the manifest describes where it is given."""
        for data in self._candidates(f"{shard_name(url)}{self._ending}.npz"):
            try:
                a = _unpacked(data)
                index = ShardIndex(
                    url, a["keys"], a["offsets"], a["sizes"], a["labels"], a["checksums"], int(a["nbytes"]), a.get("words"),
                    PassedOver.unpacked(a["passed"].tobytes()) if "passed" in a else PassedOver(),
                )  # fmt: skip
                if _sound(index, a["digest"].tobytes()) and (row is None or row == row_of(index)):
                    return index
            except (ValueError, KeyError, TypeError):
                continue
        return None

    def write_sidecar(self, index: ShardIndex) -> None:
        """Write the index of one shard. Raises UserError where no folder for it can be written."""
        self._write(f"{shard_name(index.url)}{self._ending}.npz", _packed(_sidecar_arrays(index)))

    def manifest(self) -> dict[str, np.void]:
        """The row of every shard by its name; none where there is no sound manifest."""
        damaged = False
        for data in self._candidates(f"manifest{self._ending}.npz"):
            try:
                arrays = _unpacked(data)
                names, rows = arrays["names"].tobytes().decode().split("\n"), arrays["rows"].view(MANIFEST_ROW)
                if len(names) == len(rows) and _believable(rows):
                    return dict(zip(names, rows, strict=True))
            except (ValueError, KeyError, TypeError):  # the zip format has a checksum of each array
                pass
            damaged = True
        if damaged:
            logger.warning(
                "the manifest of %s is damaged or of another version: made anew from the shards' own index files.",
                self.folder,
            )
        return {}

    def write_manifest(self, rows: dict[str, np.void]) -> None:
        """Write the rows of all shards of the folder, by name. Raises UserError where no folder for them can be
        written."""
        self._write(f"manifest{self._ending}.npz", _packed(_manifest_arrays(rows)))

    def labels(self, name: str) -> list[int | str] | None:
        """The labels that were written under that name; None where there is no sound file."""
        for data in self._candidates(f"labels.{name}{self._ending}.json"):
            try:
                stored = json.loads(data)["labels"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if isinstance(stored, list) and all(type(label) in (int, str) for label in stored):
                return stored
        return None

    def write_labels(self, name: str, labels: list[int | str]) -> None:
        """Write all labels of a set of shards, for people too. Raises UserError as `write_manifest` does."""
        self._write(f"labels.{name}{self._ending}.json", json.dumps({"labels": labels}, indent=0).encode())


def _sidecar_arrays(index: ShardIndex) -> dict[str, np.ndarray]:
    words = {} if index.words is None else {"words": index.words}
    return words | {
        "nbytes": np.array(index.nbytes),
        "digest": np.frombuffer(index.digest.encode(), np.uint8),
        "keys": index.keys,
        "offsets": index.offsets,
        "sizes": index.sizes,
        "labels": index.labels,
        "checksums": index.checksums,
        "passed": np.frombuffer(index.passed.packed(), np.uint8),
    }


def _manifest_arrays(rows: dict[str, np.void]) -> dict[str, np.ndarray]:
    order = sorted(rows)
    names = np.frombuffer("\n".join(order).encode(), np.uint8)
    table = np.array([rows[name] for name in order], MANIFEST_ROW).view(np.uint8)
    return {"names": names, "rows": table}


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, version=_VERSION, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpacked(data: bytes) -> dict[str, np.ndarray]:
    """Raises ValueError or KeyError for what is no index file of this version."""
    arrays = npy.read_several(data)
    if arrays["version"].shape != () or arrays["version"] != _VERSION:
        raise ValueError("another version")
    return arrays


def _sound(index: ShardIndex, digest: bytes) -> bool:
    """Whether an index can be that of a tar: no sample beyond its end, as many of everything, the digest that it says."""
    n, kinds = len(index.keys), {"offsets": np.int64, "sizes": np.int64, "labels": np.int64, "checksums": np.uint32}
    columns = {name: getattr(index, name) for name in kinds}
    if (
        index.keys.dtype.kind != "S"
        or index.keys.ndim != 1
        or any(column.shape != (n,) or column.dtype != kinds[name] for name, column in columns.items())
    ):
        return False
    words = index.words
    if words is not None and (words.dtype.kind != "S" or words.ndim != 1):
        return False
    most = np.iinfo(np.int64).max if words is None else len(words)
    inside = (
        (index.offsets >= 0) & (index.sizes >= NO_IMAGE) & (index.offsets <= index.nbytes - np.maximum(index.sizes, 0))
    )
    numbered = (index.labels >= -1) & (index.labels < most)
    return 0 < n <= index.nbytes // BLOCK and bool(inside.all() and numbered.all()) and digest == index.digest.encode()


def _believable(rows: np.ndarray) -> bool:
    """Whether all rows of a manifest can be those of tars, in which every sample has a header of its own."""
    count = rows["count"]
    return bool(
        np.all(
            (count > 0)
            & (count <= rows["nbytes"] // BLOCK)
            & (rows["labelled"] >= 0)
            & (rows["labelled"] <= count)
            & (rows["classes"] >= WORDS)
        )
    )
