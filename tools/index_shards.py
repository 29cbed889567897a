"""Index shards, so that training starts at once: a sidecar file beside each tar (offsets, sizes, keys, labels).

  python tools/index_shards.py 'shards/train-{000000..000099}.tar'
  python tools/index_shards.py shards/

Training indexes what has no index yet; this does it beforehand, and refuses damaged shards by name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lejepa_scale.data.index import index_shards
from lejepa_scale.data.stream import expand, localise
from lejepa_scale.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="tar files, folders, URLs; braces allowed")
    parser.add_argument("--rebuild", action="store_true", help="index again what has an index")
    parser.add_argument("--cache-dir", type=Path, help="where remote shards are copied")
    arguments = parser.parse_args()
    try:
        paths = [localise(url, arguments.cache_dir) for url in expand(arguments.shards)]
        indexes = index_shards(paths, rebuild=arguments.rebuild)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    samples = sum(len(index) for index in indexes)
    labelled = sum(int((index.labels >= 0).sum()) for index in indexes)
    print(f"{len(indexes)} shards, {samples:,} images, {labelled:,} with a label")
    return 0


if __name__ == "__main__":
    sys.exit(main())
