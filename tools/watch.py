"""`lejepa watch` from a checkout."""

import sys

from lejepa_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["watch", *sys.argv[1:]]))
