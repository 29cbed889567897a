"""TCP ports for process groups that are started on this machine."""

from __future__ import annotations

import random
import socket

# Below what any system hands to outgoing connections (Linux from 32768, others from 49152): a port that was free a moment
# ago stays free until the process that was told of it listens there.
_RANGE = range(10_000, 32_768)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on, and that no outgoing connection is given."""
    for port in random.SystemRandom().sample(_RANGE, 100):
        with socket.socket() as found:
            try:
                found.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports between {_RANGE[0]} and {_RANGE[-1]} is free")
