"""The two inner loops of `characteristic` as C++, built by the machine's own compiler in a second or two and kept in the
user's cache. Sines and cosines are torch's; the rest of the work is here. Refuses devices other than the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from shutil import which

import torch
from jaxtyping import Float
from torch import Tensor

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-std=gnu++17", "-shared", "-fPIC")
_BEST = ("-march=native", "-fopenmp")  # some compilers know one or neither
_BLOCK = 1 << 18  # projections worked on at once: their sines and cosines stay in the cache
_REALS = {torch.float32: "float", torch.float64: "double"}


def sums(p: Float[Tensor, "r n"], dt: float, knots: int) -> Float[Tensor, "2 k r"]:
    """Cosine and sine sums of each row at angles k dt p, k = 1 .. knots-1."""
    out = p.new_zeros(2, knots - 1, len(p))
    kernel = _library(p.dtype).sums
    for start, cos, sin in _blocks(p, dt):
        kernel(cos.data_ptr(), sin.data_ptr(), out[0, 0, start:].data_ptr(), *cos.shape, *out.shape[1:], _threads())
    return out


def gradient(p: Float[Tensor, "r n"], weights: Float[Tensor, "2 k r"], dt: float) -> Float[Tensor, "r n"]:
    """sum_k (weights_1k cos - weights_0k sin)(k dt p)."""
    out, weights = torch.empty_like(p), weights.contiguous()
    kernel = _library(p.dtype).gradient
    for start, cos, sin in _blocks(p, dt):
        pointers = (cos, sin, weights[0, 0, start:], out[start:])
        kernel(*(t.data_ptr() for t in pointers), *cos.shape, *weights.shape[1:], _threads())
    return out


@cache
def available() -> bool:
    """Whether the kernels can be built here; where not, says why, once."""
    try:
        for dtype in _REALS:
            _library(dtype)
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"SIGReg runs without its C++ kernels (about 3 times slower): {error}", stacklevel=2)
        return False
    return True


def _blocks(p: Float[Tensor, "r n"], dt: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, and cosine and sine of dt p, of some rows at a time. The buffers are used again."""
    if not p.numel():
        return
    rows = max(1, _BLOCK // p.shape[1])
    cosines, sines = p.new_empty(2, min(rows, len(p)), p.shape[1])
    for start in range(0, len(p), rows):
        block = p[start : start + rows]
        cos, sin = cosines[: len(block)], sines[: len(block)]
        torch.mul(block, dt, out=sin)
        torch.cos(sin, out=cos)
        yield start, cos, sin.sin_()


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build(_REALS[dtype])))
    library.sums.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 4 + [ctypes.c_int]
    library.gradient.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 4 + [ctypes.c_int]
    library.sums.restype = library.gradient.restype = None
    return library


def _build(real: str) -> Path:
    """The shared library for one precision; a name for each source, compiler and processor, since homes are shared."""
    compiler = next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := which(name))), None
    )
    if compiler is None:
        raise OSError("no C++ compiler (g++ or clang++) was found")
    key = "\n".join([_SOURCE.read_text(), compiler, *_FLAGS, *_BEST, platform.machine(), _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lejepa_scale"
    target = folder / f"native-{real}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch, target.name)
        for extra in (_BEST, _BEST[:1], _BEST[1:], ()):
            command = [compiler, f"-DREAL={real}", *_FLAGS, *extra, "-o", str(built), str(_SOURCE)]
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
