"""Addresses of shards: what makes two of them one shard, and what in them is a signature that changes from day to day."""

from __future__ import annotations

import hashlib
import re
import shlex
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, urlencode

from lejepa_scale.addresses import is_remote

_SIGNED = re.compile(  # AWS (both versions), Google Cloud, CloudFront; the overrides of an answer's headers go with them
    r"X-Amz-.*|X-Goog-.*|AWSAccessKeyId|GoogleAccessId|Key-Pair-Id|Signature|Expires|Policy|Hash-Algorithm|response-.*",
    re.I,
)
_AZURE = re.compile(r"sig|sv|ss|srt|sr|sp|st|se|sip|spr|si|sdd|skoid|sktid|skt|ske|sks|skv|saoid|suoid|scid")


def identity(url: str) -> str:
    """The address without user, password and signature: two signed addresses of one shard are the same. Paths and
    commands as they are."""
    if not is_remote(url) or url.startswith("pipe:"):
        return url
    base, _, query = split_user(url)[0].partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    azure = any(name == "sig" for name, _ in pairs)
    kept = [(n, v) for n, v in pairs if not (_SIGNED.fullmatch(n) or (azure and _AZURE.fullmatch(n)))]
    return f"{base}?{urlencode(kept)}" if kept else base


def split_user(url: str) -> tuple[str, str]:
    """(the address without its user, `user:password` as it is written); the latter empty where it has none."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    user, at, host = host.rpartition("@")
    return (f"{scheme}{mark}{host}{slash}{path}", user) if at and mark else (url, "")


def shard_name(url: str) -> str:
    """Its file name, wherever it lies, with a mark where a query tells it from others; of a command, a digest."""
    if url.startswith("pipe:"):
        return hashlib.blake2b(url.encode(), digest_size=12).hexdigest()
    base, _, query = identity(url).partition("?") if is_remote(url) else (url, "", "")
    mark = f".{hashlib.blake2b(query.encode(), digest_size=6).hexdigest()}" if query else ""
    return base.rpartition("/")[2] + mark


def index_again(url: str) -> str:
    """What to do where a shard is not what its index says."""
    command = f"`lejepa shards index --rebuild {shlex.quote(str(url))}`"
    return f"{command}, with --out where data.index_dir is set, and the source's keys where it has any"


def folder_of(url: str) -> str:
    """Where it lies; one place for all commands."""
    if url.startswith("pipe:"):
        return "pipe:"
    folder, slash, _ = (url.partition("?")[0] if is_remote(url) else url).rpartition("/")
    return folder or slash or "."


def expired(url: str, now: datetime | None = None) -> datetime | None:
    """When the address's signature ended, where it says so and that is past."""
    given = {name.lower(): value for name, value in parse_qsl(url.partition("?")[2])}
    try:
        if begun := given.get("x-amz-date") or given.get("x-goog-date"):
            seconds = int(given.get("x-amz-expires") or given.get("x-goog-expires") or "")
            until = datetime.strptime(begun, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) + timedelta(seconds=seconds)
        elif "expires" in given:
            until = datetime.fromtimestamp(int(given["expires"]), UTC)
        else:
            until = datetime.fromisoformat(given["se"].replace("Z", "+00:00"))
            until = until if until.tzinfo else until.replace(tzinfo=UTC)
    except (KeyError, ValueError, OverflowError, OSError):
        return None
    return until if until < (now or datetime.now(UTC)) else None
