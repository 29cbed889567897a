"""The sources of a run, indexed: how many samples each has, what determines their order, and how their bytes are read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from lejepa_scale.config import Data
from lejepa_scale.data.audit.keylog import Header, Record
from lejepa_scale.data.folders import shards_of
from lejepa_scale.data.index.classes import ClassNumbers, class_numbers
from lejepa_scale.data.index.keys import SampleKeys
from lejepa_scale.data.index.scan import ShardIndex
from lejepa_scale.data.index.shards import Shards, index_shards
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.data.order import Location
from lejepa_scale.errors import UserError

logger = logging.getLogger(__name__)


def name_of(shard: ShardIndex, member: int) -> str:
    """Of a sample, for people: SHARD.tar/KEY."""
    return f"{shard.name}/{shard.key(member)}"


@dataclass(frozen=True)
class Mixture:
    """The indexed shards of every source of a mixture."""

    shards: list[Shards]
    weights: list[float]
    classes: ClassNumbers

    @property
    def counts(self) -> list[Int64[np.ndarray, " _shards"]]:
        """Samples of each shard, for each source."""
        return [source.counts for source in self.shards]

    @property
    def num_samples(self) -> int:
        """Of all sources, in one epoch of each."""
        return sum(int(counts.sum()) for counts in self.counts)

    @property
    def num_labelled(self) -> int:
        """Samples that have a class number."""
        return sum(int(source.rows["labelled"].sum()) for source in self.shards)

    @property
    def num_classes(self) -> int:
        """Of all samples where every one has a label, else 0."""
        return self.classes.count if self.num_labelled == self.num_samples else 0

    @property
    def fingerprint(self) -> str:
        """Changes when shards, their names, contents or the weights change: the order would not be the same."""
        parts = b"".join(source.fingerprint for source in self.shards) + repr(self.weights).encode()
        return hashlib.blake2b(parts, digest_size=16).hexdigest()

    def record(self, position: int, location: Location, key: str) -> Record:
        """What was drawn at a position, where the sample called `key` came of it."""
        shard = self.shards[location.source][location.shard]
        drawn = shard.key(location.member)
        return Record(position, *location, name_of(shard, location.member), "" if key == drawn else key)

    def expect(self, names: Collection[str]) -> None:
        """Raises UserError where a sample of such a name is in no shard."""
        wanted: dict[str, set[str]] = {}
        for name in names:
            shard, _, key = name.partition(".tar/")
            wanted.setdefault(f"{shard}.tar", set()).add(key)
        for found in (one for source in self.shards for one in source if one.name in wanted):
            wanted[found.name] -= {found.key(member) for member in range(len(found))}
        if missing := [f"{shard}/{key}" for shard, keys in wanted.items() for key in sorted(keys)]:
            raise UserError(
                f"train.skip_samples: no shard of data.shards has a sample {missing[0]!r}"
                f"{f' (nor {len(missing) - 1} more of these)' if len(missing) > 1 else ''}. A name is SHARD.tar/KEY, as "
                "nonfinite.jsonl has it."
            )

    def key_log_header(self, data: Data, *, seed: int, global_batch: int, decoded: bool) -> Header:
        """All that the order depends on, how many samples an epoch of each source has, and whether images were read."""
        return {
            "fingerprint": self.fingerprint,
            "seed": seed,
            "shuffle_block": data.shuffle_block,
            "global_batch": global_batch,
            "samples": [int(counts.sum()) for counts in self.counts],
            "decoded": decoded,
        }


def open_mixture(data: Data, *, build: bool = True) -> Mixture:
    """Expand and index every source of the configuration. Raises UserError that names what is missing.

    Without `build`, only what another process has indexed is read."""
    reader = reader_of(data)
    shards = [
        index_shards(
            shards_of(source.shards, build=build),
            keys=SampleKeys.parsed(source.image_key, source.label_key),
            reader=reader,
            index_dir=data.index_dir,
            build=build,
        )
        for source in data.shards
    ]
    mixture = Mixture(shards, [source.weight for source in data.shards], class_numbers(shards, build=build))
    for source in shards:
        if source.passed.notable:
            logger.warning("passed over in %s: %s", source.urls[0], "; ".join(source.passed.lines()))
    if build and 0 < mixture.num_labelled < mixture.num_samples:
        missing = mixture.num_samples - mixture.num_labelled
        logger.warning("%d of %d samples have no label: the online probe is off.", missing, mixture.num_samples)
    return mixture


def reader_of(data: Data) -> Reader:
    """A reader by the settings of the data section."""
    return Reader(
        read_timeout=data.read_timeout, retries=data.retries, cache_dir=data.cache_dir, cache_gb=data.cache_gb
    )
