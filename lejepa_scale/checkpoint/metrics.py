"""metrics.jsonl: one object a line, what a run has reported. Reads what a crash may have torn; refuses to write."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lejepa_scale.checkpoint.places import ABSENT, reading

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl that can be read, by ascending `step`; none where there is no file. Values are
    numbers, or None for what was no number. A crash of the system may have left half a line, or zeros in place of one: these
    are told of. Raises UserError where the file is there and cannot be read."""
    return [record for _, record in read_lines(path)]


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """As `read_metrics`, with each record's line."""
    try:
        with reading(path):
            data = path.read_bytes()
    except ABSENT:
        return []
    found, torn = [], 0
    for line in data.decode(errors="replace").split("\n"):
        try:
            record = json.loads(line)
            int(record["step"])
            found.append((line, record))
        except (ValueError, TypeError, KeyError, OverflowError):
            torn += bool(line)
    if torn:
        logger.warning("%d lines of %s cannot be read, and are left out: a crash may have torn them.", torn, path)
    return sorted(found, key=lambda pair: int(pair[1]["step"]))


def steps_taken(run_dir: Path) -> int:
    """The last step that a run's metrics.jsonl tells of; 0 where there is none."""
    return max((int(record["step"]) for record in read_metrics(run_dir / METRICS)), default=0)
