"""Features on disk, under a name made of all that they depend on: the weights, the images, how they are seen. Refuses to
give what is not of exactly these."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lejepa_scale.data.index.classes import ClassNumbers
from lejepa_scale.data.index.shards import Shards
from lejepa_scale.evaluation.features import Extracted, Kind
from lejepa_scale.evaluation.subjects import Subject

logger = logging.getLogger(__name__)
_FORMAT = 1  # of the files, and of what features are: raise it where the same encoder and images give others
LIMIT = 20 * 2**30  # bytes; beyond it the files that were used least recently are deleted


@dataclass(frozen=True)
class Cache:
    """A folder; None: nothing is kept."""

    folder: Path | None
    limit: int = LIMIT

    def key(self, subject: Subject, shards: Shards, numbers: ClassNumbers) -> str:
        """Of one encoder on one set of images: a fingerprint is of places, checksums and labels."""
        said = [
            _FORMAT,
            subject.digest,
            subject.image_size,
            repr(subject.pixels),
            subject.before_classifier,
            shards.fingerprint.hex(),
        ]
        return hashlib.blake2b(json.dumps([*said, numbers.count, numbers.labels]).encode(), digest_size=12).hexdigest()

    def read(self, key: str, kinds: Sequence[Kind]) -> Extracted | None:
        """None where some kind is not there, or a file is broken."""
        if self.folder is None:
            return None
        rows, labels, keys = {}, torch.zeros(0), list[str]()
        for kind in kinds:
            path = self._path(key, kind.name)
            try:
                with safe_open(path, "pt") as file:
                    rows[kind.name], labels = file.get_tensor("rows"), file.get_tensor("labels")
                    keys = bytes(file.get_tensor("keys").numpy()).decode(errors="surrogateescape").split("\n")[:-1]
                os.utime(path)
            except (OSError, SafetensorError, UnicodeError):
                return None
            if not len(rows[kind.name]) == len(labels) == len(keys):
                return None
        return Extracted(rows, labels, keys)

    def write(self, key: str, features: Extracted) -> None:
        """Nothing but a message where there is no room: the features are there in any case."""
        if self.folder is None:
            return
        text = "".join(f"{name}\n" for name in features.keys).encode(errors="surrogateescape")
        keys = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for kind, rows in features.rows.items():
                path = self._path(key, kind)
                part = path.with_suffix(f".{os.getpid()}")
                save_file({"rows": rows.contiguous(), "labels": features.labels, "keys": keys}, part)
                part.rename(path)
            self._prune()
        except (OSError, SafetensorError) as error:
            logger.warning("features are not kept in %s: %s", self.folder, error)

    def _path(self, key: str, kind: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}-{kind}.safetensors"

    def _prune(self) -> None:
        assert self.folder is not None
        files = sorted(
            ((p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob("*.safetensors")), reverse=True
        )
        total = 0
        for _, size, path in files:
            total += size
            if total > self.limit and total > size:
                path.unlink(missing_ok=True)
