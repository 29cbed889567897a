"""Tar shards from what their members shall hold."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

Members = dict[str, bytes]


def tar_of(
    members: Members | list[tuple[str, bytes]], links: Iterable[tarfile.TarInfo] = (), compression: str = ""
) -> bytes:
    """links: headers without data, at the end. compression: "gz", or another of tarfile. Of a list, names may be equal."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in links:
            tar.addfile(info)
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def shard(path: Path, members: Members, links: Iterable[tarfile.TarInfo] = (), compression: str = "") -> str:
    """Write it, and its folder. Returns what `data.shards` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members, links, compression))
    return str(path)
