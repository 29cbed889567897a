"""How long OpenMP's threads wait awake under `lejepa`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lejepa_scale.cpu.spinning import spin_briefly


@pytest.mark.parametrize(
    ("given", "set_to"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
    ids=["nothing", "a count", "a policy"],
)
def test_what_the_user_has_said_stays(given: dict[str, str], set_to: str | None) -> None:
    environment = dict(given)
    spin_briefly(environment)
    assert environment.get("GOMP_SPINCOUNT") == set_to


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch comes with libgomp on Linux alone")
def test_libgomp_hears_of_it() -> None:
    """It tells what it has read when torch loads it, which is after the command has begun."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "lejepa_scale", "doctor"],
        cwd=ROOT, env=environment | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
