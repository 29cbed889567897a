"""What is in the shards. A sidecar per shard says where each image lies, and its checksum; a manifest per folder of shards
says how many images each shard holds, so that a run reads one file at its start (files.py)."""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, Shaped

from lejepa_scale.addresses import is_remote
from lejepa_scale.data.faults import printable
from lejepa_scale.data.index.files import MANIFEST_ROW, IndexLocation, row_of
from lejepa_scale.data.index.keys import DEFAULT_KEYS, SampleKeys
from lejepa_scale.data.index.passed import PassedOver
from lejepa_scale.data.index.scan import ShardIndex, scan
from lejepa_scale.data.io.address import folder_of, shard_name
from lejepa_scale.data.io.reader import Reader, gone
from lejepa_scale.errors import UserError
from lejepa_scale.parallel.threads import Pool
from lejepa_scale.progress import bar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_HELD_SAMPLES = 1 << 20  # of the sidecars that a process keeps in memory, about 60 bytes each
_SHOWN = 20  # faults that one error lists


@dataclass
class Shards:
    """The shards of one source in the order given, as their manifest describes them: arrays over shards, and the index
    of a shard when it is asked for. 100,000 shards take about 20 MB."""

    urls: Sequence[str]
    rows: Shaped[np.ndarray, " shards"]  # of MANIFEST_ROW
    homes: dict[str, IndexLocation]
    keys: SampleKeys = DEFAULT_KEYS
    passed: PassedOver = field(default_factory=PassedOver)  # in the shards whose own index was read or made just now

    def __post_init__(self) -> None:
        self._held: OrderedDict[int, ShardIndex] = OrderedDict()

    def __len__(self) -> int:
        return len(self.urls)

    def __iter__(self) -> Iterator[ShardIndex]:
        return (self[number] for number in range(len(self)))

    @property
    def counts(self) -> Int64[np.ndarray, " shards"]:
        """Samples of each shard, those without an image included."""
        return self.rows["count"]

    @cached_property
    def fingerprint(self) -> bytes:
        """Of names and contents; not of the place where they lie."""
        names = "\n".join(shard_name(url) for url in self.urls)
        return hashlib.blake2b(names.encode() + self.rows.tobytes(), digest_size=16).digest()

    def __getitem__(self, number: int) -> ShardIndex:
        """The index of a shard, from memory or from its sidecar. Raises UserError where that is not what the manifest
        promises. Not for several threads."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        url, row = self.urls[number], self.rows[number]
        home = self.homes[folder_of(url)]
        index = home.sidecar(url, row)
        if index is None:
            if not is_remote(url) and not Path(url).exists():
                raise UserError(gone(url))
            raise UserError(
                f"the index of shard {url} is missing, damaged, or not the one that its manifest names. "
                f"Run `lejepa shards index{self.keys.options}{home.option} {shlex.quote(str(url))}` and start again."
            )
        self._held[number] = index
        while sum(len(held) for held in self._held.values()) > _HELD_SAMPLES and len(self._held) > 1:
            self._held.popitem(last=False)
        return index

    def distinct_labels(self, *, build: bool = True, rebuild: bool = False) -> list[int | str]:
        """All labels, each once, sorted: from their file, which is written where it is not there, or anew. Raises UserError
        without `build`, where it is not."""
        home = self.homes[folder_of(self.urls[0])]
        name = self.fingerprint.hex()[:16]
        if not rebuild and (known := home.labels(name)) is not None:
            return known
        if not build:
            raise UserError(
                f"this rank does not see the labels of {self.urls[0]} and others, which rank 0 has just written to "
                f"{home.written[0]}. Set data.index_dir to a folder that every node sees."
            )
        found: set[int | str] = set()
        for index in _progress(self, len(self), "reading labels"):
            numbers = np.unique(index.labels[index.labels >= 0])
            found.update(numbers.tolist() if index.words is None else (w.decode() for w in index.words.tolist()))
        labels = sorted(found, key=lambda label: (isinstance(label, str), label))
        home.write_labels(name, labels)
        return labels


def index_shards(
    urls: Sequence[str],
    *,
    keys: SampleKeys = DEFAULT_KEYS,
    reader: Reader | None = None,
    index_dir: Path | None = None,
    workers: int = 8,
    rebuild: bool = False,
    check_sidecars: bool = False,
    manifest: bool = True,
    build: bool = True,
) -> Shards:
    """The shards of `urls`, from their manifest; those it lacks from sidecars; those without a sidecar by scanning.

    Local shards are compared with their recorded size here, remote ones when they are first read. What had to be scanned
    or merged is written: sidecars at once, so that an interrupted call goes on where it was, then the manifest (unless
    `manifest` is False: one of several jobs). `check_sidecars` reads every sidecar, not the manifest. Without `build`,
    nothing is written and what is missing is refused. Raises one UserError that lists every shard that cannot be used.
    """
    reader = reader or Reader()
    _refuse_repeats(urls)
    homes = _homes(urls, index_dir, reader, keys)
    rows = np.zeros(len(urls), MANIFEST_ROW)
    known = {folder: home.manifest() for folder, home in homes.items()}
    lacking = [
        number for number, url in enumerate(urls) if not _fill(rows, number, known[folder_of(url)].get(shard_name(url)))
    ]
    if build:
        lacking = sorted({*lacking, *_changed(urls, rows, workers)})
    if check_sidecars or rebuild:
        lacking = list(range(len(urls)))
    if lacking and not build:
        raise UserError(
            f"this rank does not see the index of {len(lacking)} of {len(urls)} shards, for instance {urls[lacking[0]]}, "
            f"which rank 0 has just read or written in {homes[folder_of(urls[lacking[0]])].written}. "
            "Set data.index_dir to a folder that every node sees."
        )
    shards = Shards(urls, rows, homes, keys)
    if lacking:
        scanned = partial(_scanned, keys=keys, reader=reader)
        shards.passed.update(_index(shards, lacking, scanned, workers, rebuild))
    if lacking and manifest:
        for number, url in enumerate(urls):
            known[folder_of(url)][shard_name(url)] = rows[number]
        for folder, home in homes.items():
            home.write_manifest(known[folder])
    return shards


def verify(
    urls: Sequence[str], *, keys: SampleKeys = DEFAULT_KEYS, reader: Reader, index_dir: Path | None, workers: int
) -> list[str]:
    """Read every shard again and compare it with its sidecar; the differences, one sentence per shard. A shard that
    cannot be read is one too."""
    homes = _homes(urls, index_dir, reader, keys)

    def compare(url: str) -> str | None:
        home = homes[folder_of(url)]
        try:
            stored, found = home.sidecar(url), scan(url, reader, keys)
        except UserError as error:
            return str(error)
        if stored is None:
            command = f"lejepa shards index{keys.options}{home.option} {shlex.quote(str(url))}"
            return f"shard {url} has no index, or a damaged one. Run `{command}`."
        return (
            None
            if stored.digest == found.digest
            else f"shard {url} differs from its index: {_difference(stored, found)}"
        )

    return [
        fault for fault in _progress(_each(workers, compare, [(u,) for u in urls]), len(urls), "verifying") if fault
    ]


def _index(
    shards: Shards,
    lacking: list[int],
    scanned: Callable[[str, IndexLocation], ShardIndex | UserError],
    workers: int,
    rebuild: bool,
) -> Iterator[PassedOver]:
    """Fill the rows of the shards `lacking`, from sound sidecars, else by scanning; what either passed over."""
    places = {number: (shards.urls[number], shards.homes[folder_of(shards.urls[number])]) for number in lacking}

    def sidecar(url: str, home: IndexLocation) -> ShardIndex | None:
        stored = home.sidecar(url)
        return stored if stored is not None and _fits(url, row_of(stored)) else None

    missing = lacking
    if not rebuild:
        missing = []
        for number, index in zip(lacking, _each(workers, sidecar, list(places.values())), strict=True):
            if index is None:
                missing.append(number)
            else:
                shards.rows[number] = row_of(index)
                yield index.passed
    if not missing:
        return
    logger.info(
        "%d of %d shards have no index that fits them: reading them once. "
        "`lejepa shards index%s` does this beforehand, on as many machines as you like.",
        len(missing),
        len(shards),
        shards.keys.options,
    )
    faults: list[str] = []
    results = _progress(_each(workers, scanned, [places[number] for number in missing]), len(missing), "indexing")
    for number, result in zip(missing, results, strict=True):
        if isinstance(result, UserError):
            faults.append(str(result))
        else:
            shards.rows[number] = row_of(result)
            yield result.passed
    if faults:
        more = f" And {len(faults) - _SHOWN} shards more." if len(faults) > _SHOWN else ""
        many = f"{len(faults)} shards cannot be used. " if len(faults) > 1 else ""
        raise UserError(many + " ".join(faults[:_SHOWN]) + more)


def _scanned(url: str, home: IndexLocation, *, keys: SampleKeys, reader: Reader) -> ShardIndex | UserError:
    """Read once, and its index written."""
    try:
        index = scan(url, reader, keys)
        home.write_sidecar(index)
    except UserError as error:
        return error
    return index


def _homes(urls: Sequence[str], index_dir: Path | None, reader: Reader, keys: SampleKeys) -> dict[str, IndexLocation]:
    return {f: IndexLocation(f, index_dir, reader, keys.mark) for f in dict.fromkeys(map(folder_of, urls))}


def _refuse_repeats(urls: Sequence[str]) -> None:
    """Two shards of one name in a folder would share an index, and one shard twice would repeat its samples."""
    seen: set[tuple[str, str]] = set()
    for url in urls:
        place = (folder_of(url), shard_name(url))
        if place in seen:
            raise UserError(
                f"shard {url} is listed twice in data.shards. To draw from it more often, raise its weight."
            )
        seen.add(place)


def _fill(rows: Shaped[np.ndarray, " shards"], number: int, row: np.void | None) -> bool:
    if row is not None:
        rows[number] = row
    return row is not None


def _changed(urls: Sequence[str], rows: Shaped[np.ndarray, " shards"], workers: int) -> list[int]:
    """Local shards whose size is not the recorded one."""
    local = [number for number, url in enumerate(urls) if not is_remote(url)]
    parts = [(local[i : i + 500],) for i in range(0, len(local), 500)]
    misfits = _each(workers, lambda part: [n for n in part if not _fits(urls[n], rows[n])], parts)
    return [number for part in misfits for number in part]


def _fits(url: str, row: np.void) -> bool:
    """Whether a local shard has the size that was recorded; a missing one is left to the scan to name."""
    if is_remote(url):
        return True
    try:
        return bool(Path(url).stat().st_size == row["nbytes"])
    except OSError:
        return False


def _each(workers: int, work: Callable[..., T], arguments: list[tuple]) -> Iterator[T]:
    pool = Pool(workers)
    futures = [pool.submit(partial(work, *a)) for a in arguments]
    try:
        for future in futures:
            yield future.result()  # a read ends by itself: data/io/transport.py has deadlines
    finally:
        for future in futures:
            future.cancel()
        pool.close()


def _progress(results: Iterable[T], total: int, what: str) -> Iterator[T]:
    yield from bar(what, results, unit="shard", total=total)


def _difference(stored: ShardIndex, found: ShardIndex) -> str:
    if len(stored) != len(found):
        return f"{len(stored)} samples are indexed, {len(found)} are there"
    if stored.nbytes != found.nbytes:
        return f"{stored.nbytes} bytes are indexed, {found.nbytes} are there"
    for what in ("keys", "offsets", "sizes", "labels", "checksums"):
        where = np.flatnonzero(getattr(stored, what) != getattr(found, what))
        if len(where):
            first = int(where[0])
            return (
                f"{what} of {len(where)} samples, first {printable(stored.key(first))} at byte {stored.offsets[first]}"
            )
    return "in nothing but its digest"
