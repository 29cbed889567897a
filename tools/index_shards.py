"""`lejepa shards index` from a checkout."""

import sys

from lejepa_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["shards", "index", *sys.argv[1:]]))
