"""Mutated files for the readers, in a process whose memory is bounded: what each reader made of them.

python hostile.py FOLDER KIND=COUNT...    prints one JSON object, by kind
"""

from __future__ import annotations

import io
import json
import resource
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lejepa_scale.data.audit.check import faults, read_log, summary
from lejepa_scale.data.audit.keylog import Header, Record, header_line, record_line
from lejepa_scale.data.faults import SampleFault
from lejepa_scale.data.images.decode import decode
from lejepa_scale.data.images.pixels import Pixels
from lejepa_scale.data.index.files import IndexLocation
from lejepa_scale.data.index.scan import scan
from lejepa_scale.data.io.reader import Reader
from lejepa_scale.errors import UserError

MOST = 1 << 30  # bytes beyond what the imports take
PIXELS = 1 << 22
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]
Read = Callable[[bytes], object]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, set, cut out, doubled, or numbers made large; most often near the beginning, where headers are."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        if not out:
            break
        at = int(min(len(out) - 1, rng.exponential(len(out) / 6) if rng.random() < 0.7 else rng.integers(len(out))))
        kind = rng.integers(6)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at] = INTERESTING[rng.integers(5)]
        elif kind == 2:
            del out[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            out[at:at] = out[at : at + int(rng.integers(1, 64))]
        elif kind == 4:
            out[at : at + 8] = rng.bytes(8)
        else:
            out[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(out)


def mutated_inside(data: bytes, rng: np.random.Generator) -> bytes:
    """A zip file one of whose members is mutated, with the checksum of that: the next check has to find it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as there, zipfile.ZipFile(out, "w") as new:
        names = there.namelist()
        chosen = names[rng.integers(len(names))]
        for name in names:
            new.writestr(name, mutated(there.read(name), rng) if name == chosen else there.read(name))
    return out.getvalue()


def readers(folder: Path) -> dict[str, tuple[list[bytes], Read]]:
    """By kind: files that are right, and what reads such. The folder holds `set/*.tar` with their index, and `images`."""
    shard = min((folder / "set").glob("*.tar"))
    name = shard.name
    place = folder / "mutated"
    place.mkdir(exist_ok=True)
    home = IndexLocation(str(place), None, Reader())
    home.places = home.written = [str(place)]
    true_index = IndexLocation(str(shard.parent), None, Reader()).sidecar(str(shard))
    true_rows = IndexLocation(str(shard.parent), None, Reader()).manifest()

    def sidecar(data: bytes) -> object:
        (place / f"{name}.index.npz").write_bytes(data)
        index = home.sidecar(str(place / name))
        assert index is None or index.digest == true_index.digest or all_inside(index)
        return "absent" if index is None else "read"

    def all_inside(index: object) -> bool:
        return bool((index.offsets + np.maximum(index.sizes, 0) <= index.nbytes).all())  # type: ignore[attr-defined]

    def manifest(data: bytes) -> object:
        (place / "manifest.index.npz").write_bytes(data)
        rows = home.manifest()
        assert all(row["count"] > 0 for row in rows.values())
        return "read" if rows.keys() == true_rows.keys() else "absent"

    def tar(data: bytes) -> object:
        (place / name).write_bytes(data)
        index = scan(str(place / name), Reader())
        assert all_inside(index)
        return "read"

    def image(data: bytes) -> object:
        found = decode(data, max_pixels=PIXELS, pixels=Pixels(3, ((0, 255),)))
        assert found.shape[0] * found.shape[1] <= PIXELS
        assert found.shape[2] == 3
        return "read"

    counts = {"global_batch": 4, "samples": [6, 9]}
    header: Header = {"fingerprint": "ab", "seed": 0, "shuffle_block": 8, "decoded": True, **counts}
    lines = [
        record_line(i // 4, Record(i, i % 2, i // 12, i % 3, i, f"shard-{i % 3:06d}.tar/{i:08d}", "x" * (i == 7)))
        for i in range(40)
    ]
    log = "".join([header_line(header), *lines[:24], header_line(header), *lines[16:]]).encode()

    def keylog(data: bytes) -> object:
        (place / "log.tsv").write_bytes(data)
        found = read_log(place / "log.tsv")
        texts = [summary(found), *faults(found)]
        assert all(text.isprintable() for text in texts)
        assert sum(map(len, texts)) < 20_000
        return "read"

    files = {p: p.read_bytes() for p in sorted((folder / "images").iterdir())}
    return {
        "sidecar": ([(shard.parent / f"{name}.index.npz").read_bytes()], sidecar),
        "manifest": ([(shard.parent / "manifest.index.npz").read_bytes()], manifest),
        "tar": ([shard.read_bytes()], tar),
        "image": (list(files.values()), image),
        "keylog": ([log], keylog),
    }


def memory(name: str) -> int:
    """A figure of this program in bytes. getrusage's peak is that of the program that started it, too."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) << 10


def main(folder: Path, counts: dict[str, int]) -> None:
    of_kinds = readers(folder)
    limit, before = memory("VmSize") + MOST, memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found = {kind: tried(kind, count, folder, *of_kinds[kind]) for kind, count in counts.items()}
    print(json.dumps({kind: one | {"largest": memory("VmHWM") - before} for kind, one in found.items()}))


def tried(kind: str, count: int, folder: Path, originals: list[bytes], read: Read) -> dict[str, object]:
    outcomes: Counter[str] = Counter()
    slowest, rng = 0.0, np.random.default_rng(7)
    for number in range(count):
        inside = kind in ("sidecar", "manifest") and number % 2
        data = (mutated_inside if inside else mutated)(originals[number % len(originals)], rng)
        started = time.monotonic()
        try:
            outcome = str(read(data))
        except (UserError, SampleFault) as error:
            outcome = "refused" if len(str(error)) < 1000 else "a very long message"
        except BaseException as error:
            (folder / f"crash-{kind}-{number}").write_bytes(data)
            outcome = f"{type(error).__name__}: {error}"[:200]
        slowest = max(slowest, time.monotonic() - started)
        outcomes[outcome] += 1
    return {"outcomes": outcomes, "slowest": slowest}


if __name__ == "__main__":
    main(Path(sys.argv[1]), {kind: int(count) for kind, _, count in (word.partition("=") for word in sys.argv[2:])})
