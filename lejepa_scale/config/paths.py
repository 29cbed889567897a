"""Where a user's own files lie, apart from those that a configuration names."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Folder for what can be made again: index files, copies of shards, built kernels. Follows XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lejepa_scale"
