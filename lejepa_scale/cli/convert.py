"""lejepa convert: the encoder out of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from lejepa_scale.cli.command import Command, add_weights

_DESCRIPTION = """  lejepa convert runs/quickstart encoder.safetensors --to safetensors --verify

safetensors: tensors under timm's names; the metadata says how to build the model with timm.create_model."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="run directory (its newest checkpoint) or a step directory, or the address of one (s3://...)"
    )
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--to", choices=["safetensors"], default="safetensors")
    add_weights(parser)
    parser.add_argument("--verify", action="store_true", help="load it with timm alone and compare features")


def _run(arguments: argparse.Namespace) -> int:
    from lejepa_scale.checkpoint.convert import export_encoder, verify_export

    count = export_encoder(arguments.source, arguments.target, arguments.weights)
    print(f"wrote {count} tensors to {arguments.target}")
    if arguments.verify:
        difference = verify_export(arguments.source, arguments.target, arguments.weights)
        print(f"verified with timm: largest difference {difference:.1e}")
    return 0


COMMAND = Command("convert", "write the encoder for other programs", _DESCRIPTION, _add_arguments, _run)
