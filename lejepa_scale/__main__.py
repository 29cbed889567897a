"""`python -m lejepa_scale`, for launchers that take a module."""

from lejepa_scale.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
