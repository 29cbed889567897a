"""C++ kernels for the CPU: built by the machine's own compiler in a second or two, kept in the user's cache, loaded once.
What is loaded runs in this process: it lies in a folder that nobody else can write, and is whole."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from shutil import which

import torch

from lejepa_scale.config.paths import user_cache

_FLAGS = ("-O3", "-std=gnu++17", "-shared", "-fPIC")
_BEST = ("-march=native", "-fopenmp")  # some compilers know one or neither
_unwanted = False


_REALS = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}
_TYPES = {"*": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int}


@dataclass
class Kernels:
    """The functions of one C++ file, which is written for REAL, float or double.

    signatures: of each function its arguments: * pointer, r REAL, l long, i int; they return nothing. fallback: what a
    machine without a compiler does instead, for the one warning that says so.
    """

    source: Path
    signatures: dict[str, str]
    fallback: str
    _loaded: dict[torch.dtype, ctypes.CDLL | None] = field(default_factory=dict)

    def library(self, dtype: torch.dtype) -> ctypes.CDLL | None:
        """The functions for a precision, built and loaded at the first call; None where that is not possible or wanted."""
        if _unwanted:
            return None
        if dtype not in self._loaded:
            self._loaded[dtype] = self._load(*_REALS[dtype]) if dtype in _REALS else None
        return self._loaded[dtype]

    def call(self, name: str, dtype: torch.dtype, *arguments: float) -> None:
        """Run a function on pointers and numbers, with torch's number of threads. `library` must have found it."""
        getattr(self.library(dtype), name)(*arguments, torch.get_num_threads())

    def _load(self, real: str, ctype: type) -> ctypes.CDLL | None:
        try:
            library = ctypes.CDLL(str(build(self.source, real)))
        except (OSError, subprocess.SubprocessError) as error:
            warnings.warn(f"{self.fallback}: {error}", stacklevel=2)
            return None
        for name, arguments in self.signatures.items():
            function = getattr(library, name)
            function.argtypes = [ctype if kind == "r" else _TYPES[kind] for kind in arguments] + [ctypes.c_int]
            function.restype = None
        return library


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, no library is found: for tensors that have no memory to point to."""
    global _unwanted
    before, _unwanted = _unwanted, True
    try:
        yield
    finally:
        _unwanted = before


def build(source: Path, real: str) -> Path:
    """The shared library of `source` with REAL as `real`, float or double.

    A name for each source, compiler and processor, since homes are shared. Raises OSError where there is no compiler, or it
    fails.
    """
    compiler = next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := which(name))), None
    )
    if compiler is None:
        raise OSError("no C++ compiler (g++ or clang++) was found")
    key = "\n".join([source.read_text(), compiler, *_FLAGS, *_BEST, platform.machine(), _processor()])
    folder = _private_folder()
    target = folder / f"{source.stem}-{real}-{_digest(key.encode(), 8)}.so"
    said = target.with_suffix(".digest")
    with suppress(OSError):
        if said.read_text() == _digest(target.read_bytes()):
            return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch, target.name)
        for extra in (_BEST, _BEST[:1], _BEST[1:], ()):
            command = [compiler, f"-DREAL={real}", *_FLAGS, *extra, "-o", str(built), str(source)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if result.returncode == 0:
                break
        else:
            raise OSError(f"{compiler} failed: {result.stderr.strip()[-300:]}")
        said_there = built.with_suffix(".digest")
        said_there.write_text(_digest(built.read_bytes()))
        built.replace(target)  # whole or not at all, though several ranks may build
        said_there.replace(said)
    return target


def _digest(data: bytes, size: int = 32) -> str:
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def _private_folder() -> Path:
    """Of the user's cache, where it is this user's alone; else one that goes with the process."""
    folder = user_cache() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = folder.lstat()
        writable = stat.S_IMODE(there.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(there.st_mode) and there.st_uid == os.geteuid() and not writable and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _own_folder()


@cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lejepa_scale-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
