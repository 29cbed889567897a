"""Which versions are in use, read from what is installed without importing any of it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from lejepa_scale import __version__

TORCH_TRIED = ("2.13", "2.15")  # the whole test suite with each, on CPUs
TORCH_TRIED_ON_A_GPU = "2.11"  # the benchmark and the tests that need one, on an H200
_LIBRARIES = ("torch", "torchvision", "timm", "deepspeed", "xformers", "torchao", "webdataset")


def versions() -> str:
    rows = [("lejepa_scale", __version__), ("python", platform.python_version())]
    rows += [(name, installed(name) or "absent") for name in _LIBRARIES]
    tried = f"tried with torch {' and '.join(TORCH_TRIED)}: the whole test suite; "
    rows.append(("", f"{tried}{TORCH_TRIED_ON_A_GPU}: the tests of a GPU"))
    return "\n".join(f"{name:<14}{text}" for name, text in rows)


def installed(name: str) -> str:
    """Its version; empty where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
