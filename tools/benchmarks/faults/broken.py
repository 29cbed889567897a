"""`python -m lejepa_scale` with a part that breaks once the file FAULT_FILE is there. FAULT says which: `clock`, the time of
day as this process is told it goes back an hour; `nan`, the views of the last rank are none."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from lejepa_scale.cli.main import main
from lejepa_scale.data.batch import Batch

_FILE = Path(os.environ["FAULT_FILE"])
_time, _augmented = time.time, Batch.augmented


def _an_hour_ago() -> float:
    return _time() - 3600 * _FILE.exists()


def _not_a_number(self: Batch, device: torch.device) -> list[Tensor]:
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    return [view * (torch.nan if last and _FILE.exists() else 1.0) for view in _augmented(self, device)]


if os.environ["FAULT"] == "clock":
    time.time = _an_hour_ago
else:
    Batch.augmented = _not_a_number  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    raise SystemExit(main())
