"""lejepa convert: an encoder for other programs."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from lejepa_scale.cli.command import Command, add_weights, positive
from lejepa_scale.errors import UserError
from lejepa_scale.logs import errors_alone

_DESCRIPTION = """  lejepa convert runs/quickstart encoder                         a folder for timm and transformers
  lejepa convert runs/quickstart encoder.onnx --to onnx
  lejepa convert s3://bucket/run encoder.safetensors --to safetensors --dtype bf16
  lejepa convert weights.pth encoder --encoder vit_small_patch14_dinov2 --image-size 518

SOURCE: a run directory (its newest checkpoint), a checkpoint, or the address of one in a store; a file or folder that this
command, timm or transformers (TimmWrapper, and the classes of --to hf) wrote; with --encoder, any weights of that encoder.

timm         a folder, for timm.create_model("local-dir:TARGET", pretrained=True) as for
             transformers.AutoModel.from_pretrained("TARGET")
hf           a folder for transformers' own class (Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ViTModel), where
             one holds the encoder exactly; the card says at which sizes
safetensors  one file under timm's names, whose metadata say how to build the model; several with --max-shard-size
onnx         pooled features and patch tokens for any number, height and width of images; always verified
dcp          the whole training state, as torch.distributed.checkpoint loads it: model.*, optim.state.*.exp_avg, ...
zero         the whole training state, as DeepSpeed's ZeRO-1, 2 and 3 load it: a universal checkpoint
lejepa       a run directory, out of such a folder: `lejepa train` with the run's configuration and this run.dir goes on;
             out of an encoder, with --config, the beginning of a run

Mean, standard deviation, size and interpolation go with each, and a model card (README.md) with folders."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+) *([KMG]?B?)", text.strip().upper())
    try:
        assert found is not None
        value = int(float(found[1]) * _UNITS[found[2] if found[2] in _UNITS else f"{found[2]}B"])
        assert value > 0
    except (AssertionError, KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: as in 5GB or 800MB") from error
    return value


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run, checkpoint, address, file or folder")
    parser.add_argument("target", type=Path, help="file or folder to write")
    parser.add_argument(
        "--to",
        choices=["timm", "hf", "safetensors", "onnx", "dcp", "zero", "lejepa"],
        default="timm",
        help="default timm",
    )
    add_weights(parser)
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the weights, default fp32"
    )
    parser.add_argument("--heads", action="store_true", help="safetensors: the projector too, under projector.*")
    parser.add_argument(
        "--max-shard-size", type=_bytes, metavar="SIZE", help="safetensors, hf: as 5GB; several files and an index"
    )
    parser.add_argument("--encoder", metavar="NAME", help="what the source is for, where it does not say: a timm name")
    parser.add_argument("--image-size", type=positive, help="with --encoder: pixels, default 224")
    parser.add_argument("--patch-size", type=positive, help="with --encoder: pixels, default what its name says")
    parser.add_argument("--channels", type=positive, help="with --encoder: default 3")
    parser.add_argument(
        "--config",
        type=Path,
        help="lejepa: that of the run, where another trainer made the state by itself, or an encoder is what there is",
    )
    parser.add_argument("--verify", action="store_true", help="compare features with the source's, at several sizes")
    parser.add_argument("--images", nargs="+", metavar="SHARDS", help="with --verify: real images too, of a run's kind")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at TARGET")
    parser.add_argument("--push", metavar="REPO", help="timm, hf: upload the folder to a model hub, as USER/NAME")


def _run(a: argparse.Namespace) -> int:
    from lejepa_scale.conversion import STATES, Given, compare, convert, open_model
    from lejepa_scale.conversion.model import DTYPES

    given = Given(a.encoder, a.image_size, a.patch_size, a.channels)
    if a.encoder is None and (a.image_size or a.patch_size or a.channels):
        raise UserError(
            "--image-size, --patch-size and --channels go with --encoder: other sources say these themselves."
        )
    if a.push and a.to not in ("timm", "hf"):
        raise UserError(f"--push is for --to timm and hf, whose folders have a model card, not {a.to}.")
    if a.to in STATES:
        return _convert_state(a)
    if a.config is not None:
        raise UserError(f"--config is for --to {', '.join(STATES)}: an encoder's source says itself what it is.")
    model = open_model(a.source, a.weights, given)
    done = convert(
        model,
        a.target,
        a.to,
        dtype=a.dtype,
        heads=a.heads,
        max_shard_bytes=a.max_shard_size,
        overwrite=a.overwrite,
        scores=_scores(Path(a.source)),
    )
    print(f"wrote {done.tensors} tensors to {a.target} ({len(done.files)} files, {done.bytes / 1e6:,.1f} MB)")
    if model.left_out:
        print(f"left out, as no part of the features: {', '.join(model.left_out)}")
    if not done.exact:
        other = "; --to timm is exact at every size" if model.exact else ": timm interpolates positions otherwise"
        print(f"exact at {model.inputs.image_size} px alone{other}.")
    if a.verify:
        real = _real_images(model, a.images) if a.images else None
        with errors_alone("torch.utils._pytree"):  # it warns of how torchao, which transformers imports, calls it
            for found in compare(model, a.target, a.to, exact=done.exact, dtype=DTYPES[a.dtype], real=real):
                print(f"verified with {found}")
    if a.push:
        from lejepa_scale.conversion.push import push

        print(f"uploaded to {push(a.target, a.push)}")
    return 0


def _convert_state(a: argparse.Namespace) -> int:
    from lejepa_scale.conversion import convert_state, open_state

    of_encoders = {
        "--heads": a.heads,
        "--max-shard-size": a.max_shard_size,
        "--encoder": a.encoder,
        "--verify": a.verify,
    }
    if a.dtype != "fp32" or a.weights != "best" or any(of_encoders.values()):
        named = [*(name for name, value in of_encoders.items() if value), "--dtype", "--weights"]
        raise UserError(f"{named[0]} is for encoders: --to {a.to} writes the whole training state as it is.")
    done = convert_state(open_state(a.source, a.config), a.target, a.to, overwrite=a.overwrite)
    print(f"wrote {done.tensors} tensors to {a.target} ({len(done.files)} files, {done.bytes / 1e6:,.1f} MB)")
    return 0


def _scores(run: Path) -> list[dict[str, Any]]:
    """Nearest neighbours (20, else as were asked) and logistic regression of pooled features, of what `lejepa evaluate` has
    written into a run directory."""
    try:
        rows = json.loads((run / "evaluation.json").read_text())["results"]
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            column = {"knn": "knn", "logistic": "linear"}.get(row["protocol"])
            if column is None or row["features"] != "pooled":
                continue
            line = found.setdefault(row["subject"], {"name": row["subject"]})
            if column not in line or row["variant"] == "k=20":
                line[column] = float(row["metrics"]["top1"])
        return [line for line in found.values() if len(line) == 3]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _real_images(model: Any, shards: list[str]) -> Any:
    """The first few of the shards, as the encoder takes them."""
    from lejepa_scale.data import Pixels, evaluation_batches
    from lejepa_scale.data.images.photometric import normalize

    inputs = model.inputs
    ranges = next((tuple(tuple(pair) for pair in found) for found in inputs.ranges if found), None)
    pixels = Pixels(inputs.channels, ranges, tuple(inputs.mean), tuple(inputs.std))
    images, _ = next(
        iter(evaluation_batches(shards, image_size=inputs.image_size, batch_size=4, limit=4, pixels=pixels))
    )
    return normalize(images, pixels)


COMMAND = Command("convert", "write an encoder for other programs", _DESCRIPTION, _add_arguments, _run)
