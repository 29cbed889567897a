"""`lejepa train` for launchers that want a file."""

import sys

from lejepa_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
