"""How a kind of benchmark is made known: its name, its arguments, and the function that measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Results

TOY = Path(__file__).parents[3] / "configs/vits_cifar10.yaml"  # the recipe of --smoke
Run = Callable[[argparse.Namespace], Results | int]  # an exit status where other processes have measured and printed


class Kinds:
    """The subcommands of a parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(dest="kind", required=True)

    def add(self, name: str, run: Run, *, overrides: bool = False, **words: Any) -> argparse.ArgumentParser:
        """A kind, which has --smoke and --json as all have; with `overrides`, key.sub=value may stand anywhere among its
        options, and is found in `overrides`."""
        kind: argparse.ArgumentParser = self._parsers.add_parser(name, **words)
        kind.add_argument("--smoke", action="store_true", help="toy sizes on whatever device is here")
        kind.add_argument("--json", type=Path, help="also write the results as JSON")
        if overrides:
            text = "override a key of the configuration"
            kind.add_argument("overrides", nargs="*", metavar="key.sub=value", help=text)
        kind.set_defaults(run=run, takes_overrides=overrides)
        return kind
