"""How long OpenMP's threads wait for one another awake: 300,000 turns of a loop by libgomp's default. A thread that shares
its core with another process seems to spend its time there, and to have none left for work. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_TURNS = 1000  # of libgomp's loop, in place of its 300,000; docs/benchmarks.md#threads-that-wait


def spin_briefly(environment: MutableMapping[str, str] | None = None) -> None:
    """Have threads sleep soon when they wait. Call before torch is imported; does nothing where the user has said how they
    wait (GOMP_SPINCOUNT, OMP_WAIT_POLICY). Without libgomp it changes nothing."""
    environment = os.environ if environment is None else environment
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(_TURNS))
