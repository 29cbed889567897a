"""Which versions are in use, read from what is installed without importing any of it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from lejepa_scale import __version__

# The whole test suite with the first; a wheel alone, trained and evaluated, with the last.
TORCH_TRIED = ("2.13", "2.15")
_LIBRARIES = ("torch", "torchvision", "timm", "deepspeed", "xformers", "torchao", "webdataset")


def versions() -> str:
    rows = [("lejepa_scale", __version__), ("python", platform.python_version())]
    rows += [(name, _installed(name)) for name in _LIBRARIES]
    rows.append(
        ("", f"tried with torch {TORCH_TRIED[0]}, the whole test suite; {TORCH_TRIED[1]}, a run of the base install")
    )
    return "\n".join(f"{name:<14}{text}" for name, text in rows)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
