"""What decoders written in C print about an image on the process's standard error, where nobody could tell which image it is
about: caught, and handed to who can."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_DECODERS = re.compile(
    rb"libpng |Corrupt JPEG data|Premature end of JPEG|Invalid SOS|Inconsistent progression|Unknown Adobe|Bogus |"
    rb"Unsupported marker|Warning: unknown JFIF|Invalid (?:JPEG|component|crop|SOS)|Application transferred"
)
# Of libjpeg (jerror.h) and libpng: some of the image's pixels are not those that were stored.
_LOST = re.compile(
    r"libpng error|premature end|bad (?:Huffman|arithmetic) code|found marker|Inconsistent progression", re.I
)
_lock = threading.RLock()
_file: IO[bytes] | None = None
_owner = 0  # the process that opened it


@contextmanager
def printed() -> Iterator[list[str]]:
    """The list is filled at the end with the lines of decoders; what else was printed meanwhile goes where it was to. One
    thread at a time."""
    lines: list[str] = []
    with _lock:
        try:
            before = os.dup(2)
        except OSError:  # no standard error, so nothing to keep clean
            yield lines
            return
        file = _to_catch().fileno()
        os.dup2(file, 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            if size := os.fstat(file).st_size:
                caught = os.pread(file, size, 0).splitlines(keepends=True)
                os.ftruncate(file, 0)
                os.lseek(file, 0, os.SEEK_SET)
                lines += [line.decode(errors="replace").strip() for line in caught if _DECODERS.match(line)]
                if others := b"".join(line for line in caught if not _DECODERS.match(line)):
                    os.write(2, others)


def lost(lines: list[str]) -> str | None:
    """What was printed about pixels that are not those of the image; None where there was nothing, or nothing of weight."""
    return next((line for line in lines if _LOST.search(line)), None)


def _to_catch() -> IO[bytes]:
    global _file, _owner
    if _file is None or _owner != os.getpid():  # a fork has its own: it would share the place in the file
        _file, _owner = tempfile.TemporaryFile(buffering=0), os.getpid()
    return _file
