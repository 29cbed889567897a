"""Which members of a sample are its image and its label, and what a label is: a number or a word."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Shaped

from lejepa_scale.config import Data
from lejepa_scale.errors import UserError

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")  # such as int64 holds
LONGEST_LABEL = 4096  # bytes
LONGEST_DOCUMENT = 1 << 26  # bytes of JSON that a label stands in


@dataclass(frozen=True)
class SampleKeys:
    """Which members of a sample are its image and its label, by their endings. image: the preferred one first; empty: all of
    images. path: where in the JSON document of that ending the label stands; empty: the member is the label."""

    image: tuple[str, ...] = ()
    label: str = "cls"
    path: tuple[str, ...] = ()

    @classmethod
    def parsed(cls, image_key: str, label_key: str) -> SampleKeys:
        """Of a source's `image_key`, as `left.jpg;left.png`, and `label_key`, as `cls` or `json:category.id`."""
        label, _, path = label_key.partition(":")
        image = tuple(key.strip().lower() for key in image_key.split(";") if key.strip())
        return cls(image, label.strip().lower(), tuple(part for part in path.split(".") if part))

    @property
    def options(self) -> str:
        """By which commands take them, for messages."""
        image = f" --image-key '{';'.join(self.image)}'" if self.image else ""
        return image + (f" --label-key {self.label_key}" if self.label_key != DEFAULT_KEYS.label else "")

    @property
    def label_key(self) -> str:
        """As a source has it."""
        return ":".join(filter(None, (self.label, ".".join(self.path))))

    @property
    def mark(self) -> str:
        """By which index files of another choice have names of their own; empty for the default."""
        return "" if self == DEFAULT_KEYS else hashlib.blake2b(repr(self).encode(), digest_size=4).hexdigest()


DEFAULT_KEYS = SampleKeys()


def keys_of_run(data: Data, image_key: str | None = None, label_key: str | None = None) -> SampleKeys:
    """Of shards that a run did not name: as its own, but for a key that is given. Raises UserError where its sources have
    several."""
    image_keys, label_keys = ({getattr(s, key) for s in data.shards} for key in ("image_key", "label_key"))
    for name, given, found in (("image_key", image_key, image_keys), ("label_key", label_key, label_keys)):
        if given is None and len(found) > 1:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"the run's sources have several values of {name}: say which these shards have ({option}).")
    return SampleKeys.parsed(
        next(iter(image_keys)) if image_key is None else image_key,
        next(iter(label_keys)) if label_key is None else label_key,
    )


def read_label(data: bytes, path: tuple[str, ...]) -> int | str | None:
    """A class number, a name or none; with a path, what stands there in a JSON document. Raises ValueError for what else."""
    try:
        return _class(_at(json.loads(data), path) if path else data.decode("utf-8-sig").strip())
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def numbered(
    labels: list[int | str | None],
) -> tuple[Int64[np.ndarray, " n"], Shaped[np.ndarray, " words"] | None]:
    """Numbers as they are; where a label is a word, rows of the sorted labels as words."""
    if not any(isinstance(label, str) for label in labels):
        return np.array([-1 if label is None else label for label in labels], np.int64), None
    words = sorted({str(label).encode() for label in labels if label is not None})
    row = {word: number for number, word in enumerate(words)}
    numbers = [-1 if label is None else row[str(label).encode()] for label in labels]
    return np.array(numbers, np.int64), np.array(words)


def _at(document: object, path: tuple[str, ...]) -> object:
    """What stands there, or None."""
    for part in path:
        if isinstance(document, list) and part.isdigit() and int(part) < len(document):
            document = document[int(part)]
        elif isinstance(document, dict):
            document = document.get(part)
        else:
            return None
    return document


def _class(found: object) -> int | str | None:
    """A class number, or a name. Raises ValueError for what is neither."""
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError("neither a number nor a name")
    text = str(found)
    if not text or not text.isprintable() or len(text) > LONGEST_LABEL:
        raise ValueError("no name")
    return int(text) if _INTEGER.fullmatch(text) else text
