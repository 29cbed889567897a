"""`lejepa plan` from a checkout."""

import sys

from lejepa_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
