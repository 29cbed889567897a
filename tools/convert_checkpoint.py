"""Take the encoder out of a checkpoint, for other programs.

  python tools/convert_checkpoint.py runs/quickstart encoder.safetensors --to safetensors --verify

safetensors: tensors under timm's names; the metadata says how to build the model with timm.create_model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from safetensors import safe_open

from lejepa_scale.checkpoint import load_encoder
from lejepa_scale.checkpoint.encoder import export_encoder
from lejepa_scale.errors import UserError


def verify(source: Path, target: Path) -> float:
    """Rebuild the model with timm alone and compare its features with ours; the largest difference."""
    encoder, config = load_encoder(source)
    with safe_open(target, "pt") as file:
        plain = timm.create_model(**json.loads(file.metadata()["timm"])).eval()
        plain.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    images = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = float((encoder([images])[0] - plain(images)).abs().max())
    if difference > 1e-4:
        raise UserError(f"{target} gives features that differ by {difference:.1e} from the checkpoint's.")
    return difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run directory (its newest checkpoint) or a step directory")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--to", choices=["safetensors"], default="safetensors")
    parser.add_argument("--verify", action="store_true", help="load it with timm alone and compare features")
    arguments = parser.parse_args()
    try:
        count = export_encoder(arguments.source, arguments.target)
        print(f"wrote {count} tensors to {arguments.target}")
        if arguments.verify:
            print(f"verified with timm: largest difference {verify(arguments.source, arguments.target):.1e}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
