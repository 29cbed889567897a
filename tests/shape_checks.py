"""The switch CHECK_SHAPES=1: every function and dataclass of the package checks its annotations, shapes included, each time
it is called. Here and in every Python process that tests start."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parent
UNCHECKED = (
    "lejepa_scale.objective.triton_kernels",
    "lejepa_scale.model.branch_triton",
    "lejepa_scale.data.images.photometric_triton",
)  # Triton reads the source of its kernels: no wrapper may come between


def wanted() -> bool:
    return os.environ.get("CHECK_SHAPES", "") not in ("", "0")


def install() -> None:
    """Check what of the package is imported from here on; also in child processes, which find `sitecustomize` at their
    start."""
    import jaxtyping
    from jaxtyping import _import_hook

    if any(isinstance(finder, _import_hook._JaxtypingFinder) for finder in sys.meta_path):
        return
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "lejepa_scale")
    assert not loaded, f"imported before the check was on: {loaded}"
    hook: Any = jaxtyping.install_import_hook("lejepa_scale", "shape_checks.checked").hook
    chosen = hook.should_instrument
    hook.should_instrument = lambda name: name not in UNCHECKED and chosen(name)
    paths = [
        str(_TESTS / "checked_start"),
        str(_TESTS),
        str(_TESTS.parent),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))


def checked(function: Any) -> Any:
    """beartype; as for mypy, an int will do where a float is asked for."""
    from beartype import BeartypeConf, BeartypeHintOverrides, beartype
    from pydantic import ValidationInfo  # a protocol that Python cannot ask an object for

    overrides = BeartypeHintOverrides({ValidationInfo: Any})
    return beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=overrides))(function)
