"""The kinds of tools/bench.py: their arguments, and what they measure by them."""

from benchmarks.kinds import devices, files, learning, operating, steps

REGISTER = (devices.register, steps.register, files.register, learning.register, operating.register)

__all__ = ["REGISTER"]
