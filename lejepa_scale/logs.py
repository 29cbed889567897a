"""Where the package's messages go. The library logs under its modules' names and configures nothing; a program shows the
messages by `to_stderr`, which leaves the loggers of other libraries, and the root's, as they are."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from lejepa_scale.addresses import redacted
from lejepa_scale.errors import UserError
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


@contextmanager
def errors_alone(name: str) -> Iterator[None]:
    """Inside, the logger of another library's module says nothing less than an error, whatever sets its level meanwhile."""
    logger = logging.getLogger(name)

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


class _RunLog(logging.Handler):
    """Lines in a run's directory, with time and level. Held back until the run has a configuration there: a start that is
    refused leaves nothing behind. What cannot be written is let go."""

    def __init__(self, path: Path, begun: Path) -> None:
        super().__init__()
        self._path, self._begun, self._held = path, begun, list[str]()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            self._held.append(redacted(self.format(record)) + "\n")
            if self._begun.exists():
                with self._path.open("a") as file:
                    file.writelines(self._held)
                self._held = []


@contextmanager
def kept(run_dir: Path) -> Iterator[None]:
    """Inside, the package's messages are kept in a run's train.log too, with what ends it: on rank 0, and, from warnings
    upwards, in train_rank3.log on another rank that has any."""
    rank, logger = launch.rank(), logging.getLogger("lejepa_scale")
    name = f"train_rank{rank}.log" if rank else "train.log"
    handler = _RunLog(run_dir / name, run_dir / "config.yaml")
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        words = None if isinstance(error, UserError | SystemExit) else (type(error), error, error.__traceback__)
        said = str(error) if isinstance(error, UserError) else f"ended by {type(error).__name__}"
        if not (isinstance(error, UserError) and error.everywhere and rank):
            handler.handle(logging.LogRecord("lejepa_scale", logging.ERROR, __file__, 0, said, None, words))
        raise
    finally:
        logger.removeHandler(handler)


def to_stderr() -> None:
    """Show the package's messages on stderr from now on: from information upwards on rank 0, on other ranks warnings alone,
    since most of what happens does so on all of them. For programs; a second call changes nothing."""
    logger = logging.getLogger("lejepa_scale")
    logger.setLevel(logging.INFO if launch.rank() == 0 else logging.WARNING)
    if not any(isinstance(handler, _AboveBars) for handler in logger.handlers):
        logger.addHandler(_AboveBars())
