"""A sample's encoded image, checked against its index before anything decodes it: there, and unaltered."""

from __future__ import annotations

import zlib
from concurrent.futures import Future

from lejepa_scale.addresses import is_remote
from lejepa_scale.data.faults import SampleFault
from lejepa_scale.data.index.scan import NO_IMAGE, ShardIndex
from lejepa_scale.data.io.reader import Reader


def read_ahead(reader: Reader, shard: ShardIndex, member: int) -> Future[bytes] | None:
    """Start to fetch a sample of a remote shard; hand the result to `read_image`."""
    if shard.sizes[member] == NO_IMAGE:
        return None
    offset, size = int(shard.offsets[member]), int(shard.sizes[member])
    return reader.ahead(shard.url, offset, size, nbytes=shard.nbytes, digest=shard.digest)


def read_image(reader: Reader, shard: ShardIndex, member: int, ahead: Future[bytes] | None = None) -> bytes:
    """The encoded image of a sample. Raises SampleFault with the reason; UserError where the whole shard is lost."""
    offset, size = int(shard.offsets[member]), int(shard.sizes[member])
    if size == NO_IMAGE:
        raise SampleFault("the shard holds other members of this key, but no image")
    expected = int(shard.checksums[member])
    where = {"nbytes": shard.nbytes, "digest": shard.digest}
    if ahead is not None:
        data = reader.awaited(ahead, shard.url, size, shard.nbytes)
    else:
        data = reader.read(shard.url, offset, size, **where)  # type: ignore[arg-type]
    found = zlib.crc32(data)
    if found != expected and is_remote(shard.url):  # altered on its way, or in the cache?
        data = reader.read(shard.url, offset, size, fresh=True, **where)  # type: ignore[arg-type]
        found = zlib.crc32(data)
    if found != expected:
        raise SampleFault(f"its bytes changed since it was indexed (CRC-32 {found:08x}, not {expected:08x})")
    return data
