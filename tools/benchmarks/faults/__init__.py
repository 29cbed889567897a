"""What becomes of a run that something happens to, and of the next one."""

from benchmarks.faults.inject import as_table, inject
from benchmarks.faults.victims import LAUNCHERS

__all__ = ["LAUNCHERS", "as_table", "inject"]
