"""Where the package's messages go. The library logs under its modules' names and configures nothing; a program shows the
messages by `to_stderr`, which leaves the loggers of other libraries, and the root's, as they are."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO

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


class _Outliving:
    """A stream whose reader may be gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_terminal() -> None:
    """Let what is written to stderr go nowhere, rather than raise, once the terminal or the launcher behind it is gone: a
    run that is told so by SIGHUP still has to save."""
    if not isinstance(sys.stderr, _Outliving):
        sys.stderr = _Outliving(sys.stderr)  # type: ignore[assignment]


def to_stderr() -> None:
    """Show the package's messages on stderr from now on: from information upwards on rank 0, on other ranks warnings alone,
    since most of what happens does so on all of them. For programs; a second call changes nothing."""
    logger = logging.getLogger("lejepa_scale")
    logger.setLevel(logging.INFO if launch.rank() == 0 else logging.WARNING)
    if not any(isinstance(handler, _AboveBars) for handler in logger.handlers):
        logger.addHandler(_AboveBars())
