"""Files that torch.save wrote, of which nothing but tensors and plain values is made."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lejepa_scale.errors import UserError


class _Plain:
    """Stands for a class that a pickle names: holds what it says of it."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def loaded(path: Path, classes: Sequence[str] = ()) -> Any:
    """What is in it; tensors stay on the disk until they are used. classes: full names that may occur, whose objects become
    plain ones. Raises UserError where it cannot be read, or names anything else."""
    try:
        with torch.serialization.safe_globals([(_Plain, name) for name in classes]):
            return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"reading {path} would run code that it names, which is never done here.") from error
    except Exception as error:  # of zip files, of the system, of whatever bytes make of an unpickler
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read: {reason}") from error
