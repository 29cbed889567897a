"""One shard read from front to back: where its images lie, their checksums and labels. Refuses a tar that is damaged, cut
short, or holds what training would pass over in silence."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64, Shaped, UInt32

from lejepa_scale.data.io.reader import Reader, shard_name
from lejepa_scale.errors import UserError

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff"})
ARRAYS = frozenset({"npy"})  # images where there are no pictures; beside those, something about them
IMAGE_EXTENSIONS = PICTURES | ARRAYS
_BLOCK = 512  # of the tar format
NO_IMAGE = -1  # as the size of a sample whose image is missing


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar: bytes [offsets[i], offsets[i] + sizes[i]) are the encoded image of sample i. Where that
    is missing the size is NO_IMAGE, and the offset that of the sample's first other member."""

    url: str
    keys: Shaped[np.ndarray, " n"]  # bytes, UTF-8
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]  # -1 where the sample has no .cls member
    checksums: UInt32[np.ndarray, " n"]  # CRC-32 of the image's bytes
    nbytes: int  # of the tar

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def name(self) -> str:
        """The shard's file name."""
        return shard_name(self.url)

    def key(self, member: int) -> str:
        """The name that the members of a sample share."""
        return self.keys[member].decode("utf-8", "surrogateescape")

    @cached_property
    def digest(self) -> str:
        """Of everything here but the address."""
        state = hashlib.blake2b(f"{self.nbytes} {self.keys.dtype}".encode(), digest_size=16)
        for array in (self.keys, self.offsets, self.sizes, self.labels, self.checksums):
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()


class _Members:
    """What a scan has seen so far, by key."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pictures: dict[str, tuple[int, int, int]] = {}  # offset, size, CRC-32
        self.arrays: dict[str, tuple[int, int, int]] = {}
        self.labels: dict[str, int] = {}
        self.first: dict[str, tuple[int, set[str]]] = {}  # offset of the first member, all extensions

    def add(self, member: tarfile.TarInfo, stream: _Stream) -> None:
        key, dot, extension = _split(member.name)
        if not dot or member.isdir():
            return
        if not member.isfile():
            if extension in IMAGE_EXTENSIONS:
                raise UserError(
                    f"shard {self.url}: {member.name} is a link, not a file. Write the shard with its images."
                )
            return
        _, extensions = self.first.setdefault(key, (member.offset_data, set()))
        if extension in extensions:
            raise UserError(
                f"shard {self.url} holds {member.name} twice (again at byte {member.offset}). "
                "Keys must differ within a shard: write it again."
            )
        extensions.add(extension)
        if extension == "cls":
            self.labels[key] = _label(stream.exactly(min(member.size, 64)), self.url, key)
        elif extension in ARRAYS and not self.pictures:
            self.arrays[key] = (member.offset_data, member.size, stream.checksum(member.size))
        elif extension in PICTURES and key not in self.pictures:
            self.pictures[key] = (member.offset_data, member.size, stream.checksum(member.size))

    def index(self, nbytes: int) -> ShardIndex:
        """Every key with an image, and every key that has what goes with the images of this shard, but none itself."""
        images = self.pictures or self.arrays
        if not images:
            raise UserError(
                f"shard {self.url} holds no images (members ending in {', '.join(sorted(IMAGE_EXTENSIONS))}). "
                "Check data.shards, or write shards with `lejepa shards make`."
            )
        companions = {"cls"}.union(*(self.first[key][1] for key in images))
        keys = [key for key, (_, extensions) in self.first.items() if key in images or extensions & companions]
        rows = [images.get(key, (self.first[key][0], NO_IMAGE, 0)) for key in keys]
        offsets, sizes, checksums = zip(*rows, strict=True)
        return ShardIndex(
            self.url,
            np.array([key.encode("utf-8", "surrogateescape") for key in keys]),
            np.array(offsets, np.int64),
            np.array(sizes, np.int64),
            np.array([self.labels.get(key, -1) for key in keys], np.int64),
            np.array(checksums, np.uint32),
            nbytes,
        )


def scan(url: str, reader: Reader) -> ShardIndex:
    """Read a shard once. Raises UserError that names it and what to do."""
    stream = _Stream(reader.stream(url))
    members = _Members(url)
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                stream.seek(member.offset_data)
                members.add(member, stream)
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isfile() else member.offset_data
                tar.members.clear()
    except EOFError as error:
        raise _cut(url, stream.tell()) from error
    except tarfile.TarError as error:
        if stream.tell() == 0:
            raise UserError(f"shard {url} is empty. Write it again or remove it from data.shards.") from error
        if not stream.last:
            raise _cut(url, stream.tell()) from error
        packed = (
            " It is compressed; only plain tars can be read at any place." if stream.head[:2] == b"\x1f\x8b" else ""
        )
        raise UserError(
            f"shard {url} is not a readable tar file: {error}.{packed} Write it again or remove it."
        ) from error
    if len(stream.last) < _BLOCK:
        raise _cut(url, end)
    if any(stream.last):
        raise UserError(
            f"shard {url} has a damaged header at byte {stream.tell() - _BLOCK}. "
            "Copy or write it again; reading on would silently lose samples."
        )
    closed = stream.tell()
    if not stream.only_zeros_left():
        raise UserError(
            f"shard {url} goes on after its end-of-archive block at byte {closed - _BLOCK}: a damaged header, or tars "
            "joined by cat. Write it again; tar readers stop there and would silently lose samples."
        )
    return members.index(stream.tell())


def _cut(url: str, position: int) -> UserError:
    return UserError(
        f"shard {url} is cut short: no end-of-archive block after byte {position}. "
        "Copy or write it again; reading on would silently lose samples."
    )


class _Stream:
    """A file that can be read, and passed over, in one direction only."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._held, self._position = chunks, memoryview(b""), 0
        self.last = self.head = b""  # what the last call of `read` gave, and the first

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or position < self._position:
            raise io.UnsupportedOperation("a shard is read in one direction")
        for _ in self._pieces(position - self._position):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        self.last = b"".join(self._pieces(size))
        self.head = self.head or self.last[:_BLOCK]
        return self.last

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def checksum(self, size: int) -> int:
        value, got = 0, 0
        for piece in self._pieces(size):
            value, got = zlib.crc32(piece, value), got + len(piece)
        if got < size:
            raise EOFError
        return value

    def only_zeros_left(self) -> bool:
        return all(bytes(piece).count(0) == len(piece) for piece in self._pieces(1 << 62))

    def _pieces(self, size: int) -> Iterator[memoryview]:
        while size > 0:
            if not self._held:
                self._held = memoryview(next(self._chunks, b""))
                if not self._held:
                    return
            piece, self._held = self._held[:size], self._held[size:]
            self._position += len(piece)
            size -= len(piece)
            yield piece


def _split(name: str) -> tuple[str, str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name; the rest is the extension."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, dot, extension.lower()


def _label(text: bytes, url: str, key: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"shard {url}: {key}.cls holds {text[:20]!r}, not a class number.") from error
