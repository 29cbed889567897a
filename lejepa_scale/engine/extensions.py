"""Locks that torch leaves in the folders where it builds C++ and CUDA extensions, DeepSpeed's among them: a build that was
killed leaves one behind, and every later build of the same waits for it for ever."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)
_NAME = "lock"  # of torch.utils.cpp_extension's FileBaton
STALE_SECONDS = 600.0  # without a change in the folder: a compiler writes more often


def root() -> Path:
    """Where extensions are built (TORCH_EXTENSIONS_DIR)."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def stale_locks(folder: Path | None = None, seconds: float = STALE_SECONDS) -> list[Path]:
    """Locks that no process here holds open, in folders where nothing has changed for `seconds`: a build on another host of
    a shared home directory would show."""
    found = []
    base = folder or root()
    for path in [*base.glob(f"*/{_NAME}"), *base.glob(f"*/*/{_NAME}")]:
        with suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in [path, *path.parent.iterdir()])
            if time.time() - newest > seconds and not _held(path):
                found.append(path)
    return found


def release_stale_locks(folder: Path | None = None) -> None:
    """Remove them, which is told of."""
    for path in stale_locks(folder):
        with suppress(OSError):
            path.unlink()
            logger.warning(
                "%s was left by a build that was killed: removed, or the next build would wait for ever.", path
            )


def _held(path: Path) -> bool:
    """Whether a process that can be seen from here has it open."""
    wanted = path.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
