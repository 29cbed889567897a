"""What a reader of members or files passed over: how many of each kind, and one of them by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from lejepa_scale.data.faults import printable

HIDDEN = "hidden, or what systems and WebDataset keep for themselves"
LINK = "links or devices, not files"
NO_ENDING = "without an ending"
OTHER = "of another ending than images have"
SEVERAL_DOTS = "images whose names have several dots (WebDataset ends a name at the first: image_key chooses them)"
SECOND = "further images of a sample (image_key chooses one)"
BESIDE = "arrays beside pictures"
STRAY = "beside the folders of the classes (--no-labels takes all images, without labels)"
COMPANION = "beside the image of their sample"
NO_IMAGE = "samples whose image is missing: each is a fault when it is drawn"
NO_LABEL = "labels -1, taken for none"
NO_VALUE = "without a label at label_key"
_KINDS = 64  # that are kept apart; endings beyond them share a line
_EXPECTED = frozenset({COMPANION})  # what nobody needs to be told of at the start of a run


@dataclass
class PassedOver:
    """Counts and an example, by reason and ending."""

    kinds: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, ending: str = "", count: int = 1) -> None:
        """One more, or several, of which `name` is one."""
        kind = reason, ending
        if kind not in self.kinds and len(self.kinds) >= _KINDS:
            kind = reason, ""
        before, example = self.kinds.get(kind, (0, name))
        self.kinds[kind] = before + count, example

    def update(self, others: Iterable[PassedOver]) -> None:
        """Those of other shards, each of which names its own."""
        for other in others:
            for (reason, ending), (count, name) in other.kinds.items():
                self.add(reason, name, ending, count)

    @property
    def notable(self) -> bool:
        """Whether there is anything among them that a user may have taken for a sample."""
        return any(reason not in _EXPECTED for reason, _ in self.kinds)

    def lines(self) -> list[str]:
        """For people: the most frequent kinds first."""
        rows = sorted(self.kinds.items(), key=lambda row: (-row[1][0], row[0]))
        return [
            f"{count:,} {f'.{printable(ending)} ' if ending else ''}{reason}, for instance {printable(name)}"
            for (reason, ending), (count, name) in rows
        ]

    def packed(self) -> bytes:
        """As it lies in a sidecar."""
        return json.dumps([[*kind, *found] for kind, found in self.kinds.items()]).encode()

    @classmethod
    def unpacked(cls, data: bytes) -> PassedOver:
        """Raises ValueError or TypeError for anything else than `packed` gives."""
        out = cls()
        for reason, ending, count, name in json.loads(data):
            out.add(str(reason), str(name), str(ending), int(count))
        return out
