"""One shard read from front to back: where its images lie, their checksums and labels. Refuses a tar that is damaged, cut
short, or whose samples would be lost in silence; counts what it passes over."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Int64, Shaped, UInt32

from lejepa_scale.data.faults import printable
from lejepa_scale.data.index import passed
from lejepa_scale.data.index.keys import DEFAULT_KEYS, LONGEST_DOCUMENT, LONGEST_LABEL, SampleKeys, numbered, read_label
from lejepa_scale.data.index.passed import PassedOver
from lejepa_scale.data.io.address import shard_name
from lejepa_scale.data.io.kinds import ARRAYS, IMAGES, PICTURES, compression, not_a_tar, of_compressed
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.errors import UserError

BLOCK = 512  # of the tar format
NO_IMAGE = -1  # as the size of a sample whose image is missing
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's rule for members that are about the shard


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar: bytes [offsets[i], offsets[i] + sizes[i]) are the encoded image of sample i. Where that
    is missing the size is NO_IMAGE, and the offset that of the sample's first other member."""

    url: str
    keys: Shaped[np.ndarray, " n"]  # bytes, UTF-8
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]  # class numbers, or rows of `words`; -1 where the sample has none
    checksums: UInt32[np.ndarray, " n"]  # CRC-32 of the image's bytes
    nbytes: int  # of the tar
    words: Shaped[np.ndarray, " words"] | None = None  # bytes, UTF-8, sorted: where labels are no numbers
    passed: PassedOver = field(default_factory=PassedOver, compare=False)  # members that are no part of a sample

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def name(self) -> str:
        """The shard's file name."""
        return shard_name(self.url)

    def key(self, member: int) -> str:
        """The name that the members of a sample share."""
        return self.keys[member].decode("utf-8", "surrogateescape")

    def label(self, member: int) -> int | str | None:
        """The sample's class as it is stored: a number, a word, or none."""
        number = int(self.labels[member])
        if number < 0:
            return None
        return number if self.words is None else self.words[number].decode()

    @cached_property
    def digest(self) -> str:
        """Of everything here but the address and what was passed over."""
        state = hashlib.blake2b(f"{self.nbytes} {self.keys.dtype}".encode(), digest_size=16)
        for array in (self.keys, self.offsets, self.sizes, self.labels, self.checksums):
            state.update(np.ascontiguousarray(array).tobytes())
        if self.words is not None:
            state.update(f"{self.words.dtype}".encode() + self.words.tobytes())
        return state.hexdigest()


@dataclass
class _Sample:
    """What a scan has seen of one key. The image is that of the least rank, and of several such the first."""

    first: int  # offset of its first member
    endings: set[str] = field(default_factory=set)
    image: tuple[int, int, int] | None = None  # offset, size, CRC-32
    image_ending: str = ""
    rank: int = 0
    label: int | str | None = None


class _Members:
    """What a scan has seen so far."""

    def __init__(self, url: str, keys: SampleKeys) -> None:
        self.url, self.keys = url, keys
        self.samples: dict[str, _Sample] = {}
        self.images: dict[str, tuple[int, int, int]] = {}  # by the name of the member, for hard links to it
        self.pictures = False  # whether there are any
        self.passed = PassedOver()

    def add(self, member: tarfile.TarInfo, stream: _Stream) -> None:
        """Raises UserError for what would be lost."""
        if member.isdir():
            return
        key, dot, ending = _split(member.name)
        rank, is_label = self._rank(ending), ending == self.keys.label
        if _META.match(member.name) or key.rpartition("/")[2] == "":
            self.passed.add(passed.HIDDEN, member.name)
            return
        if not dot:
            self.passed.add(passed.NO_ENDING, member.name)
            return
        if member.issparse() or not (member.isfile() or (member.islnk() and member.linkname in self.images)):
            if rank is not None or is_label:
                raise self._no_file(member)
            self.passed.add(passed.LINK, member.name, ending)
            return
        sample = self.samples.setdefault(key, _Sample(member.offset_data))
        if ending in sample.endings:
            raise UserError(
                f"shard {self.url} holds {printable(member.name)} twice (again at byte {member.offset}). "
                "Keys must differ within a shard: write it again."
            )
        sample.endings.add(ending)
        if is_label:
            sample.label = self._label(member, stream)
        elif rank is not None:
            self.pictures |= ending in PICTURES
            if member.islnk():
                image = self.images[member.linkname]
            else:
                image = member.offset_data, member.size, stream.checksum(member.size)
            self.images[member.name] = image
            if sample.image is None or rank < sample.rank:
                sample.image, sample.image_ending, sample.rank = image, ending, rank

    def _rank(self, ending: str) -> int | None:
        """Of a member among those that may be the image of its sample; None: it may not."""
        if self.keys.image:
            return self.keys.image.index(ending) if ending in self.keys.image else None
        if ending in PICTURES:
            return 0
        return 1 if ending in ARRAYS and not self.pictures else None

    def _no_file(self, member: tarfile.TarInfo) -> UserError:
        kind = "a sparse file" if member.issparse() else "a link or a device, not a file"
        if member.islnk():
            kind = f"a link to {printable(member.linkname)}, which is no image before it in the shard"
        return UserError(
            f"shard {self.url}: {printable(member.name)} is {kind}. Write the shard with its images and labels."
        )

    def _label(self, member: tarfile.TarInfo, stream: _Stream) -> int | str | None:
        where, path = f"shard {self.url}: {printable(member.name)}", self.keys.path
        if member.islnk():
            raise self._no_file(member)
        if member.size > (LONGEST_DOCUMENT if path else LONGEST_LABEL):
            raise UserError(f"{where} holds {member.size:,} bytes, more than a label has.")
        data = stream.exactly(member.size)
        try:
            label = read_label(data, path)
        except ValueError as error:
            wanted = f"a class number or name at {'.'.join(path)}" if path else "a class number or name"
            raise UserError(f"{where} holds {data[:20]!r}, not {wanted}.") from error
        if label == -1 or label is None:
            self.passed.add(passed.NO_LABEL if label == -1 else passed.NO_VALUE, member.name, self.keys.label)
            return None
        if isinstance(label, int) and label < 0:
            raise UserError(f"{where} holds {label}: class numbers begin at 0, and -1 is no class.")
        return label

    def index(self, nbytes: int) -> ShardIndex:
        """Every key with an image, and every key that has what goes with the images of this shard, but none itself."""
        arrays = not self.pictures and not self.keys.image
        images = {
            key: sample
            for key, sample in self.samples.items()
            if sample.image is not None and (arrays or self.keys.image or sample.rank == 0)
        }
        if not images:
            raise self._without_images()
        companions = {self.keys.label}.union(*(sample.endings for sample in images.values()))
        chosen = {key: s for key, s in self.samples.items() if key in images or s.endings & companions}
        for key, sample in self.samples.items():
            if key in chosen and key not in images:
                self.passed.add(passed.NO_IMAGE, key)
                continue
            for ending in sorted(sample.endings - {self.keys.label}):
                if key not in images or ending != sample.image_ending:
                    self.passed.add(self._reason(ending, key in images), f"{key}.{ending}", ending)
        rows = [images[key].image if key in images else None for key in chosen]
        labels, words = numbered([sample.label for sample in chosen.values()])
        if self.keys.label != "cls" and not (labels >= 0).any():
            raise UserError(f"shard {self.url}: no sample has a label at {self.keys.label_key}. Check label_key.")
        return ShardIndex(
            self.url,
            np.array([key.encode("utf-8", "surrogateescape") for key in chosen]),
            np.array([row[0] if row else s.first for row, s in zip(rows, chosen.values(), strict=True)], np.int64),
            np.array([row[1] if row else NO_IMAGE for row in rows], np.int64),
            labels,
            np.array([row[2] if row else 0 for row in rows], np.uint32),
            nbytes,
            words,
            self.passed,
        )

    def _reason(self, ending: str, companion: bool) -> str:
        """Why a member is neither the image nor the label of a sample."""
        if companion:
            return passed.SECOND if self._rank(ending) is not None else passed.COMPANION
        if ending in ARRAYS:
            return passed.BESIDE
        return passed.SEVERAL_DOTS if _dotted(ending) else passed.OTHER

    def _without_images(self) -> UserError:
        names = [(key, ending) for key, sample in self.samples.items() for ending in sorted(sample.endings)]
        for key, ending in names:
            if _dotted(ending) and not self.keys.image:
                return UserError(
                    f"shard {self.url} holds no images: names as {printable(f'{key}.{ending}')} have several dots, and "
                    f"WebDataset ends a name at the first. Set image_key={printable(ending)}, or rename them."
                )
        found = sorted({ending for _, ending in names})[:8]
        there = f" Its members end in {', '.join(map(printable, found))}." if found else ""
        return UserError(
            f"shard {self.url} holds no images (members ending in "
            f"{', '.join(self.keys.image or sorted(IMAGES))}).{there} "
            "Check data.shards, or write shards with `lejepa shards make`."
        )


def scan(url: str, reader: Reader, keys: SampleKeys = DEFAULT_KEYS) -> ShardIndex:
    """Read a shard once. Raises UserError that names it and what to do."""
    stream = _Stream(reader.stream(url))
    members = _Members(url, keys)
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                stream.seek(member.offset_data)
                members.add(member, stream)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK if member.isfile() else member.offset_data
                tar.members.clear()
    except EOFError as error:
        raise _cut(url, stream.tell()) from error
    except tarfile.TarError as error:
        if stream.tell() == 0:
            raise UserError(f"shard {url} is empty. Write it again or remove it from data.shards.") from error
        if not stream.last:
            raise _cut(url, stream.tell()) from error
        if fault := not_a_tar(stream.head):
            raise UserError(f"shard {url} {fault}.") from error
        if method := compression(stream.head):
            raise UserError(
                f"shard {url} is compressed ({method}), and samples are read at any place: "
                f"{of_compressed(method, str(url))}."
            ) from error
        raise UserError(f"shard {url} is not a readable tar file: {error}. Write it again or remove it.") from error
    if len(stream.last) < BLOCK:
        raise _cut(url, end)
    if any(stream.last):
        raise UserError(
            f"shard {url} has a damaged header at byte {stream.tell() - BLOCK}. "
            "Copy or write it again; reading on would silently lose samples."
        )
    closed = stream.tell()
    if not stream.only_zeros_left():
        raise UserError(
            f"shard {url} goes on after its end-of-archive block at byte {closed - BLOCK}: a damaged header, or tars "
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
        self.head = self.head or self.last[:BLOCK]
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


def _dotted(ending: str) -> bool:
    """Whether it is that of an image, but for what stands before its last dot."""
    return "." in ending and ending.rpartition(".")[2] in IMAGES
