"""One small model of every module of timm: two steps of the trainer, a checkpoint, an export that gives the same features,
and patch features; or the paragraph that refuses it. Advice that a refusal gives is followed."""

from __future__ import annotations

import re
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.measure import Row, describe
from lejepa_scale.checkpoint import load_encoder
from lejepa_scale.config import validate
from lejepa_scale.conversion import compare, convert, open_model
from lejepa_scale.data.make import sources
from lejepa_scale.data.make.writer import write_shards
from lejepa_scale.errors import UserError
from lejepa_scale.training.loop import train

# The one of the fewest parameters, by timm's module.
# fmt: off
MODELS: dict[str, str] = {
    "beit": "beit_base_patch16_224", "byoanet": "halonet_h1", "byobnet": "test_byobnet", "cait": "cait_xxs24_224",
    "coat": "coat_tiny", "convit": "convit_tiny", "convmixer": "convmixer_768_32", "convnext": "test_convnext",
    "cpubone": "cpubone_nano", "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny", "davit": "davit_tiny", "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224", "densenet": "densenet121", "dla": "dla46x_c", "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1", "efficientvit_mit": "efficientvit_b0", "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb", "fasternet": "fasternet_t0", "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf", "gcvit": "gcvit_xxtiny", "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0", "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_t",
    "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s", "lowformer": "lowformer_b0", "mambaout": "test_mambaout", "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12", "mlp_mixer": "gmlp_ti16_224", "mobilenetv3": "lcnet_035",
    "mobilenetv5": "mobilenetv5_base", "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap", "nasnet": "nasnetalarge", "nest": "nest_tiny",
    "nextvit": "nextvit_small", "nfnet": "test_nfnet", "pit": "pit_ti_224", "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0", "qwen3_vit": "qwen3_vit_88m", "rdnet": "rdnet_tiny", "regnet": "regnetx_002",
    "repghost": "repghostnet_050", "repvit": "repvit_m1", "res2net": "res2next50", "resnest": "resnest14d",
    "resnet": "test_resnet", "resnetv2": "resnetv2_18", "rexnet": "rexnet_100", "selecsls": "selecsls42",
    "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s", "shvit": "shvit_s1", "sknet": "skresnet18",
    "starnet": "starnet_s050", "swiftformer": "swiftformer_xs", "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256", "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224", "tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m",
    "twins": "twins_svt_small", "vgg": "vgg11", "visformer": "visformer_tiny", "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224", "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224", "vitamin": "vitamin_small_224", "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception", "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
# fmt: on
SIDES = {"global": 64, "local": 32}  # of the views, at first
_TRIES = 4  # advice that is followed
_ADVICE = re.compile(r"data\.views\.(global|local)\.size=(\d+)\.$")


def modules() -> set[str]:
    """Names of timm's modules that have a model."""
    return {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()}


def sweep(chosen: Sequence[str] = ()) -> Iterator[Row]:
    """A row for each of MODELS, or of the chosen modules of them."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "scenes")
        made = sources.scenes(16, 64, 0, "png", 90)
        write_shards(made.samples, shards, per_shard=16, total=16, classes=made.classes, description={})
        for module in chosen or MODELS:
            yield {"case": module, **attempt(MODELS[module], shards, Path(folder, "runs", module))}


def attempt(model: str, shards: Path, run: Path) -> Row:
    """`outcome` trained, refused or crashed, the `sides` of the views in the end, and what was last `said`."""
    sides, said = dict(SIDES), ""
    for _ in range(_TRIES):
        row: Row = {"model": model, "sides": f"{sides['global']}, {sides['local']}"}
        try:
            return row | {
                "ok": True,
                "outcome": "trained",
                "features": _trained(model, shards, run, sides),
                "said": said,
            }
        except UserError as error:
            said = str(error)
            if (run / "metrics.jsonl").exists():  # what was to be said before the first step
                return row | {"ok": False, "outcome": "crashed", "said": said}
            advice = _ADVICE.search(said)
            if advice is None:
                return row | {"ok": True, "outcome": "refused", "said": said}
            sides[advice[1]] = int(advice[2])
        except Exception as error:
            traceback.print_exc()
            return row | {"ok": False, "outcome": "crashed", "said": f"{type(error).__name__}: {error}"}
    return row | {"ok": False, "outcome": "crashed", "said": f"advice that does not help: {said}"}


def _trained(model: str, shards: Path, run: Path, sides: dict[str, int]) -> int:
    """Width of the features, after two steps, a checkpoint, a verified export and a map of patch features."""
    views = {"global": {"count": 2, "size": sides["global"]}, "local": {"count": 1, "size": sides["local"]}}
    tree: dict[str, Any] = {
        "run": {"dir": str(run)},
        "train": {"steps": 2, "global_batch": 4},
        "engine": {"name": "single", "precision": "fp32"},
        "data": {"shards": str(shards), "views": views},
        "model": {"encoder": model, "projector": {"hidden": 32, "dim": 8}},
        "objective": {"sigreg": {"num_slices": 16}},
    }
    config = validate(tree)
    train(config)
    opened = open_model(run)
    convert(opened, run / "encoder.safetensors", "safetensors", overwrite=True)
    compare(opened, run / "encoder.safetensors", "safetensors", exact=True, dtype=torch.float32)
    encoder, _ = load_encoder(run)
    with torch.no_grad():
        maps = encoder.patch_features(torch.randn(1, encoder.channels, config.image_size, config.image_size))
    if maps.shape[:2] != (1, maps.shape[2]) or not bool(maps.isfinite().all()):
        raise RuntimeError(f"patch features of shape {tuple(maps.shape)}")
    return encoder.embed_dim


def page(rows: Sequence[Row]) -> str:
    """docs/encoders.md: counts, and a line for each module."""
    machine = describe(torch.device("cpu"))
    counts = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("trained", "refused", "crashed")}
    lines = [
        _HEAD.format(**machine, **counts, modules=len(rows), asked=sum(row["sides"] != "64, 32" for row in rows)),
        "| module | model | views | features | |",
        "|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['model']} | {row['sides']} | {row.get('features', '')} | "
            + (row["outcome"] if row["outcome"] == "trained" else f"{row['outcome']}: {row['said']}")
            + " |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


_HEAD = """# Encoders

`model.encoder` is any model of timm. What it takes is asked of the model itself, without memory, before anything
starts: views of all sides -> features -> gradients. Views that a model cannot process are refused in a paragraph that
names a side that will do. Vision transformers of two families run packed (see "The step"); other models run once per view
size.

`python tools/bench.py encoders --page docs/encoders.md` wrote this page: of each of timm's {modules} modules the
smallest model, two steps of the trainer, a checkpoint, an export whose features agree with it, and patch features.
Views of 64 and 32 px at first; {asked} modules were refused with those, and trained with the sides that the refusals
named. {date}, timm {timm}, torch {torch}, 2 CPU cores.

**{trained} trained, {refused} refused, {crashed} crashed.**
"""
