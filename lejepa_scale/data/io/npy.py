"""Arrays as numpy.save writes them, from bytes that may be anything: a header is believed once the bytes that it promises
are there, so that none asks for memory that the file does not fill."""

from __future__ import annotations

import io
import warnings
import zipfile

import numpy as np
from jaxtyping import Shaped

MAGIC = b"\x93NUMPY"


def read(data: bytes) -> Shaped[np.ndarray, "..."]:
    """The array, which is not to be written to. Raises ValueError that says what is wrong."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that Python 2 wrote the header
            shape, fortran, dtype = header(file)
    except Exception as error:  # NumPy reads headers as Python text, by a tokenizer with errors of its own
        raise ValueError(f"an array whose header cannot be read: {error}") from error
    if dtype.hasobject or dtype.names:
        raise ValueError(f"an array of {dtype}: whole or floating-point numbers make an image")
    size = " x ".join(map(str, shape))
    found, expected = len(data) - file.tell(), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if found != expected or expected < 0:
        raise ValueError(f"an array {size} of {dtype} needs {expected} bytes, and {found} are there")
    flat = np.frombuffer(data, dtype, offset=file.tell()) if expected else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def read_several(data: bytes) -> dict[str, Shaped[np.ndarray, "..."]]:
    """What numpy.savez has written, by name; it compresses nothing. Raises ValueError for anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as stored:
            members = stored.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
                raise ValueError("arrays that are compressed")
            if sum(m.file_size for m in members) > len(data):
                raise ValueError("arrays that overlap")
            return {m.filename.removesuffix(".npy"): read(stored.read(m)) for m in members}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise ValueError(f"no file of arrays: {error}") from error
