"""lejepa shards index: what is in shards, said beforehand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lejepa_scale.cli.command import Command, add_keys, positive

_DESCRIPTION = """So that training starts at once: a sidecar per tar (offsets, checksums, labels), a manifest per folder.

  lejepa shards index 'shards/train-{000000..000099}.tar'
  lejepa shards index 's3://bucket/shards/{000000..099999}.tar' --job 3/64     on one of 64 machines; then, once,
  lejepa shards index 's3://bucket/shards/{000000..099999}.tar'                to merge, and index what is missing
  lejepa shards index shards/ --verify                                         read everything again and compare

Every image is read once. An interrupted call goes on where it was. Index files lie beside the shards, or where those cannot
be written in the user's cache; --out chooses another folder, which training is told as data.index_dir."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="tar files, folders, URLs; braces allowed")
    parser.add_argument("--out", type=Path, help="folder for the index files (data.index_dir)")
    add_keys(parser)
    parser.add_argument("--workers", type=positive, default=8, help="shards read at once (default 8)")
    parser.add_argument(
        "--job", type=_job, metavar="i/n", help="index the i-th of n parts, counted from 0; no manifest"
    )
    parser.add_argument("--read-timeout", type=float, default=30.0, help="seconds for up to 4 MiB of a remote shard")
    parser.add_argument("--retries", type=int, default=5, help="failures in a row before a remote shard is given up")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rebuild", action="store_true", help="index again what has an index")
    what.add_argument("--verify", action="store_true", help="read the shards again and compare; writes nothing")


def _job(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} must read i/n with 0 <= i < n, for instance 0/64")
    return int(part), int(parts)


def _run(arguments: argparse.Namespace) -> int:
    from lejepa_scale.data.index.classes import class_numbers
    from lejepa_scale.data.index.keys import SampleKeys
    from lejepa_scale.data.index.shards import index_shards, verify
    from lejepa_scale.data.io.reader import Reader, expand

    keys = SampleKeys.parsed(arguments.image_key or "", arguments.label_key or "cls")
    reader = Reader(read_timeout=arguments.read_timeout, retries=arguments.retries)
    urls = expand(arguments.shards)
    if arguments.job:
        urls = urls[arguments.job[0] :: arguments.job[1]]
        if not urls:
            print("no shard falls to this job.")
            return 0
    if arguments.verify:
        faults = verify(urls, keys=keys, reader=reader, index_dir=arguments.out, workers=arguments.workers)
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        print(f"{len(urls) - len(faults)} of {len(urls)} shards are as their index says")
        return 2 if faults else 0
    shards = index_shards(
        urls,
        keys=keys,
        reader=reader,
        index_dir=arguments.out,
        workers=arguments.workers,
        rebuild=arguments.rebuild,
        check_sidecars=True,
        manifest=arguments.job is None,
    )
    samples, labelled = int(shards.counts.sum()), int(shards.rows["labelled"].sum())
    classes = f" of {class_numbers([shards], rebuild=arguments.rebuild).count:,} classes" if labelled else ""
    print(f"{len(shards):,} shards, {samples:,} samples, {labelled:,} with a label{classes}")
    if lines := shards.passed.lines():
        print("\n  ".join(["passed over:", *lines]))
    return 0


COMMAND = Command("index", "index shards before training does", _DESCRIPTION, _add_arguments, _run)
