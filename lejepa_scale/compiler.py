"""C++ kernels for the CPU, built by the machine's own compiler in a second or two and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from shutil import which

_FLAGS = ("-O3", "-std=gnu++17", "-shared", "-fPIC")
_BEST = ("-march=native", "-fopenmp")  # some compilers know one or neither


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
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lejepa_scale"
    target = folder / f"{source.stem}-{real}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch, target.name)
        for extra in (_BEST, _BEST[:1], _BEST[1:], ()):
            command = [compiler, f"-DREAL={real}", *_FLAGS, *extra, "-o", str(built), str(source)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if result.returncode == 0:
                break
        else:
            raise OSError(f"{compiler} failed: {result.stderr.strip()[-300:]}")
        built.replace(target)  # whole or not at all, though several ranks may build
    return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
