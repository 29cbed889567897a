"""Where the package's messages go. The library logs under its modules' names and configures nothing; a program shows the
messages by `to_stderr`, which leaves the loggers of other libraries, and the root's, as they are."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from lejepa_scale.addresses import redacted
from lejepa_scale.parallel import launch


class _AboveBars(logging.Handler):
    """Plain lines on stderr; progress bars are taken away for the line and drawn again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(redacted(self.format(record)), file=sys.stderr)
        except Exception:
            self.handleError(record)


def to_stderr() -> None:
    """Show the package's messages on stderr from now on: from information upwards on rank 0, on other ranks warnings alone,
    since most of what happens does so on all of them. For programs; a second call changes nothing."""
    logger = logging.getLogger("lejepa_scale")
    logger.setLevel(logging.INFO if launch.rank() == 0 else logging.WARNING)
    if not any(isinstance(handler, _AboveBars) for handler in logger.handlers):
        logger.addHandler(_AboveBars())
