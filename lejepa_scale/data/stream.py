"""Bytes: shard patterns to files, remote shards to local copies, samples by offset."""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import cache
from glob import glob
from pathlib import Path

import webdataset as wds
from webdataset.shardlists import expand_urls

from lejepa_scale.errors import UserError


def expand(patterns: list[str]) -> list[str]:
    """Brace patterns, and folders of tars, to a list of shard paths or URLs. Refuses an empty outcome."""
    urls: list[str] = []
    for pattern in patterns:
        expanded = expand_urls(pattern) if pattern else []
        for url in expanded:
            if not is_remote(url) and Path(url).is_dir():
                urls += sorted(str(path) for path in Path(url).glob("*.tar"))
            elif not is_remote(url) and any(c in url for c in "*?["):
                urls += sorted(glob(url, recursive=True))
            else:
                urls.append(url)
    if not urls:
        raise UserError(
            f"data.shards = {', '.join(patterns) or 'nothing'} matches no shard. Give tar files, a folder that holds some, "
            "or a brace pattern such as shards/train-{000000..000099}.tar."
        )
    return urls


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url


def localise(url: str, cache_dir: Path | None) -> Path:
    """The local file behind a shard: itself, or a whole copy fetched once (webdataset's openers: pipe:, http, s3, gs)."""
    if not is_remote(url):
        return Path(url)
    folder = cache_dir or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lejepa_scale"
    name = hashlib.blake2b(url.encode(), digest_size=8).hexdigest() + ".tar"
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        with wds.gopen(url) as source, partial.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except Exception as error:  # whatever the opener of that scheme raises
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot fetch shard {url}: {error}. Check the address and your credentials.") from error
    partial.replace(target)
    return target


def read(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a sample; raises UserError where the file is shorter than its index says."""
    try:
        data = os.pread(_descriptor(path), size, offset)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error}.") from error
    if len(data) != size:
        raise UserError(
            f"shard {path} ends before byte {offset + size}, which its index promises. It changed during the run: "
            "restore it, or run tools/index_shards.py on it and start again."
        )
    return data


@cache
def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY)
