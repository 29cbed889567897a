"""The numbers of classes: those that are stored, or, where labels are words or numbers far apart, their places among all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lejepa_scale.data.faults import printable
from lejepa_scale.data.index.files import WORDS
from lejepa_scale.data.index.scan import ShardIndex
from lejepa_scale.data.index.shards import Shards
from lejepa_scale.errors import UserError

MOST = 32_768  # numbers below it are class numbers as they are


@dataclass(frozen=True)
class ClassNumbers:
    """`count` classes from 0. labels: those that have numbers by their order; None: stored numbers are class numbers."""

    count: int
    labels: tuple[int | str, ...] | None = None

    @cached_property
    def _places(self) -> dict[str, int]:
        return {str(label): number for number, label in enumerate(self.labels or ())}

    def of(self, shard: ShardIndex, member: int) -> int:
        """The class of a sample, -1 for none. Raises UserError for a label that was not there when all were numbered."""
        label = shard.label(member)
        if label is None:
            return -1
        if self.labels is None:
            return int(label)
        if str(label) not in self._places:
            raise UserError(
                f"the label {label} of {printable(shard.key(member))} in shard {shard.url} is not among those of its "
                "shards' index: run `lejepa shards index --rebuild` on all of the source's shards, with its keys, and "
                "--out where data.index_dir is set."
            )
        return self._places[str(label)]


def class_numbers(sources: Sequence[Shards], *, build: bool = True, rebuild: bool = False) -> ClassNumbers:
    """Of all samples of these shards, the same on every rank. Without `build`, another process has written what that
    takes. Raises UserError where it has not."""
    largest = max((int(source.rows["classes"].max()) for source in sources), default=0)
    if largest <= MOST and all((source.rows["classes"] != WORDS).all() for source in sources):
        return ClassNumbers(largest)
    found = {label for source in sources for label in source.distinct_labels(build=build, rebuild=rebuild)}
    words = any(isinstance(label, str) for label in found)
    labels = sorted({str(label) for label in found}) if words else sorted(found)
    return ClassNumbers(len(labels), tuple(labels))
