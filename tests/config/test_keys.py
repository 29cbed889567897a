"""Keys that moved, keys without effect, groups of keys given in part: what a person meets who edits a configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import ROOT, small_config
from pydantic import BaseModel

from lejepa_scale.config import Config, dump, load_config, migrate, recorded, validate
from lejepa_scale.config.checks import USES
from lejepa_scale.config.files import MOVED
from lejepa_scale.config.keys import keys_of, values_of
from lejepa_scale.config.schema import EngineName
from lejepa_scale.errors import UserError

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
BARE: dict[str, Any] = {  # nothing but what has no default
    "run": {"dir": "r"},
    "train": {"steps": 1, "global_batch": 2},
    "data": {"shards": "s.tar"},
    "model": {"encoder": "vit_nano"},
}
# An objective as every config.yaml held it before its keys were grouped.
FLAT = {
    "regularizer": "sigreg", "lambda": 0.1, "weighting": "additive", "prediction": "sum", "joint": True,
    "scale_centre": 0.2, "num_slices": 33, "knots": 9, "t_max": 4.0, "estimator": "u", "scale": "reference",
    "reference_n": 64, "accumulation": "unbiased", "sketch": 64, "communication": "sums", "backend": "fused",
}  # fmt: skip


def written(folder: Path, tree: dict[str, Any], name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


# -- moved keys


def test_moved_keys_are_refused_with_their_new_names_all_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, {**BARE, "objective": {"num_slices": 3, "scale_centre": 0.1}, "trian": {}})
    message = error_of(path, "objective.knots=5")
    for expected in (
        "objective.num_slices is now objective.sigreg.num_slices",
        "objective.scale_centre is now objective.visreg.weight",
        "objective.knots is now objective.sigreg.knots",
        "unknown key trian, did you mean train",
    ):
        assert expected in message
    assert "objective.t_max" not in message


def test_the_table_of_moves_leads_from_every_key_of_the_flat_objective_to_one_that_exists() -> None:
    known = {key.path for key in keys_of(Config)}
    assert set(MOVED.values()) <= known
    assert not MOVED.keys() & known
    stayed = {"regularizer", "lambda", "weighting", "prediction", "joint", "accumulation"}
    assert MOVED.keys() == {f"objective.{name}" for name in FLAT.keys() - stayed}


def test_what_a_run_wrote_before_keys_moved_is_read() -> None:
    tree = {**BARE, "objective": FLAT}
    objective = recorded(yaml.safe_dump(tree), "config.yaml").objective
    assert objective.model_dump(by_alias=True) == {
        "regularizer": "sigreg", "lambda": 0.1, "weighting": "additive", "prediction": "sum", "joint": True,
        "final_lambda": None, "accumulation": "unbiased",
        "sigreg": {
            "num_slices": 33, "knots": 9, "t_max": 4.0, "estimator": "u", "scale": "reference", "reference_n": 64,
            "communication": "sums", "backend": "fused", "tf32": False,
        },
        "weak_sigreg": {"sketch": 64},
        "visreg": {"weight": 0.2, "num_slices": 4096},
    }  # fmt: skip
    assert tree["objective"] is FLAT  # the tree that came in is left as it was
    assert "num_slices" in FLAT
    present = yaml.safe_load(dump(validate(BARE)))
    assert migrate(present) == present
    with pytest.raises(
        UserError, match=r"from disk: unknown key objective\.num_slides, did you mean objective\.sigreg\.num_s"
    ):
        recorded(yaml.safe_dump({**BARE, "objective": {"num_slides": 3}}), "from disk")


def test_a_weight_of_visreg_that_means_unset_is_unset() -> None:
    """Runs wrote `0.0` where they had none. Given with regularizer=visreg, which they did not know, it is refused."""
    for objective in ({"visreg": {"weight": 0.0}}, {**VISREG["objective"], "visreg": {"weight": 1.0}}):
        config = recorded(yaml.safe_dump({**BARE, "objective": objective}), "config.yaml")
        assert config.objective.visreg.weight is None
        assert config == validate({**BARE, "objective": {**objective, "visreg": {}}})
    with pytest.raises(UserError, match=r"objective.visreg.weight = 0 leaves nothing that holds the embeddings' scale"):
        validate({**BARE, "objective": {**VISREG["objective"], "visreg": {"weight": 0}}})
    for weight in (None, 0.5):  # the advice
        found = validate({**BARE, "objective": {**VISREG["objective"], "visreg": {"weight": weight}}})
        assert found.objective.visreg.weight == weight


def test_what_a_run_wrote_although_it_had_no_effect_is_read_as_the_default() -> None:
    data = {"shards": "s.tar", "cache_dir": "d", "cache_gb": 3.0, "retries": 1}
    tree = {**BARE, "engine": {"name": "ddp", "prefetch": 2}, "probe": {"enabled": False, "lr": 0.01}, "data": data}
    weak = {**tree, "objective": {"regularizer": "weak_sigreg", "num_slices": 256}}
    config = recorded(yaml.safe_dump(weak), "config.yaml")
    assert (config.engine.prefetch, config.probe.lr, config.objective.sigreg.num_slices) == (1, 1e-3, 1024)
    assert (config.data.cache_dir, config.data.cache_gb, config.data.retries) == (None, None, 5)
    assert validate(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("objective.num_slice=3", "objective.sigreg.num_slices"),
        ("objective.sigreg.num_slice=3", "objective.sigreg.num_slices"),
        ("objective.scale_center=0.1", "objective.visreg.weight"),
        ("objective.sigreg.sketch=3", "objective.weak_sigreg.sketch"),
        ("objective.sigreg.lambda=0.1", "objective.lambda"),
        ("objective.weak_sigreg.num_slices=3", "objective.sigreg.num_slices"),
        ("sigreg.knots=3", "objective.sigreg"),
        ("knots=3", "objective.sigreg.knots"),
        ("data.views.global.sise=32", "data.views.global.size"),
    ],
)
def test_unknown_keys_lead_to_where_the_right_one_is(tmp_path: Path, override: str, hint: str) -> None:
    message = error_of(written(tmp_path, BARE), override)
    assert "unknown key " in message
    assert message.endswith(f", did you mean {hint}?")


def test_a_question_among_faults_keeps_its_mark_alone(tmp_path: Path) -> None:
    message = error_of(written(tmp_path, BARE), "train.stepz=2", "objective.lambda=3", "optim.rl=1")
    assert "did you mean train.steps? objective.lambda: " in message
    assert "(got 3); unknown key optim.rl, did you mean optim.lr?" in message


# -- keys without effect

REMOTE = {"shards": "https://host.example/s.tar"}
PIPE = {"shards": "pipe: cat s.tar"}
# (key, a value that is not the default, sections under which it is ignored, sections under which it has an effect)
SINGLE, DDP, FSDP, ZERO1, ZERO2, ZERO3 = ({"engine": {"name": name}} for name in get_args(EngineName))
NO_JITTER = {"data": {"augment": {"jitter": 0}}}
WEAK = {"objective": {"regularizer": "weak_sigreg"}}
VISREG = {"objective": {"regularizer": "visreg"}}
TO_REFERENCE = {"objective": {"sigreg": {"scale": "reference"}}}
LOGGED = {"log": {"wandb": {"enabled": True}}}
HELD_OUT = {"evaluation": {"every": 9, "test": ["h"]}}
BUDGET = {"engine": {"activation_checkpointing": "budget", "compile": True}}
IGNORED: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    *(("engine.prefetch", 2, engine, ZERO3) for engine in (SINGLE, DDP, ZERO1, ZERO2)),
    *(("engine.shard_degree", 2, engine, FSDP) for engine in (SINGLE, DDP, ZERO1, ZERO2, ZERO3)),
    *(("engine.cpu_offload", True, engine, ZERO1) for engine in (SINGLE, DDP)),
    ("engine.activation_budget", 0.3, {"engine": {"activation_checkpointing": "full"}}, BUDGET),
    ("engine.fp8_recipe", "rowwise", {}, {"engine": {"fp8": True}}),
    ("data.prefetch", 3, {}, {"data": {"workers": 1}}),
    ("data.cache_dir", "d", {}, {"data": REMOTE}),
    ("data.read_timeout", 9.0, {}, {"data": PIPE}),
    ("data.read_timeout", 9.0, {"data": {"workers": 0}}, {"data": {"workers": 1}}),
    ("data.retries", 3, {}, {"data": REMOTE}),
    ("data.cache_gb", 1.0, {"data": REMOTE}, {"data": {**REMOTE, "cache_dir": "d"}}),
    ("data.cache_gb", 1.0, {}, {"data": PIPE}),
    *((f"data.augment.{key}", 0.3, NO_JITTER, {}) for key in ("brightness", "contrast", "saturation", "hue")),
    ("model.drop_path_uniform", True, {}, {"model": {"drop_path": 0.1}}),
    ("model.patch_drop.local", 0.3, {"data": {"views": {"local": {"count": 0}}}}, {}),
    ("model.projector.hidden", 99, {"model": {"projector": {"layers": 1}}}, {"model": {"projector": {"layers": 2}}}),
    ("model.projector.activation", "relu", {"model": {"projector": {"layers": 1}}}, {}),
    ("objective.sigreg.num_slices", 9, WEAK, {}),
    ("objective.sigreg.knots", 9, WEAK, {}),
    ("objective.sigreg.t_max", 2.0, WEAK, {}),
    ("objective.sigreg.estimator", "u", WEAK, {}),
    ("objective.sigreg.scale", "none", WEAK, {}),
    ("objective.sigreg.communication", "sums", WEAK, {}),
    ("objective.sigreg.backend", "fused", WEAK, {}),
    ("objective.sigreg.tf32", True, WEAK, {}),
    ("objective.sigreg.tf32", True, {"objective": {"sigreg": {"backend": "native"}}}, {}),
    ("objective.sigreg.reference_n", 9, WEAK, TO_REFERENCE),
    ("objective.sigreg.reference_n", 9, {"objective": {"sigreg": {"scale": "none"}}}, TO_REFERENCE),
    ("objective.weak_sigreg.sketch", 9, {}, WEAK),
    *(("objective.visreg.num_slices", 9, others, VISREG) for others in ({}, WEAK)),
    *((f"log.wandb.{key}", "x", {}, LOGGED) for key in ("project", "name")),
    ("optim.warmup_start_ratio", 0.01, {}, {"optim": {"warmup_steps": 9}}),
    ("optim.warmup_start_ratio", 0.01, {}, {"optim": {"warmup_steps": "1 epoch"}}),
    ("optim.decay", "all", {"optim": {"weight_decay": 0.0}}, {}),
    ("optim.decay", "all", {"optim": {"weight_decay": 0.0}}, {"optim": {"final_weight_decay": 0.1}}),
    ("optim.muon.momentum", 0.9, {}, {"optim": {"name": "muon"}}),
    ("optim.muon.adjust_lr", "original", {}, {"optim": {"name": "muon"}}),
    ("optim.muon.lr_ratio", 40.0, {}, {"optim": {"name": "muon"}}),
    ("optim.cooldown_steps", 1, {}, {"optim": {"schedule": "wsd"}}),
    ("average.every", 3, {}, {"average": {"kind": "swa"}}),
    ("average.start", 0.5, {}, {"average": {"kind": "ema"}}),
    ("average.decay", 0.99, {"average": {"kind": "swa"}}, {"average": {"kind": "ema"}}),
    ("probe.lr", 0.1, {"probe": {"enabled": False}}, {}),
    ("evaluation.test", ["h"], {}, {"evaluation": {"every": 9}}),
    *(
        (f"evaluation.{key}", value, {}, HELD_OUT)
        for key, value in (("train", ["t"]), ("images", 9), ("view_images", 9))
    ),
    *((f"evaluation.{key}", value, {}, HELD_OUT) for key, value in (("k", 9), ("time_share", 0.2))),
]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(old[key], new[key]) for key in old.keys() & new.keys() if isinstance(new[key], dict)}
    return {**old, **new, **both}


def under(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("key", "value", "without", "with_"), IGNORED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_key_without_effect_is_refused_and_the_advice_helps(
    tmp_path: Path, key: str, value: Any, without: dict[str, Any], with_: dict[str, Any]
) -> None:
    validate(merged(merged(BARE, with_), under(key, value)))
    path = written(tmp_path, merged(merged(BARE, without), under(key, value)))
    message = error_of(path)
    assert f"{key} = " in message
    assert "has no effect" in message
    reset = re.search(rf"\(({re.escape(key)}=[^ )]*)\)", message)
    assert reset
    assert dict(values_of(load_config(path, [reset[1]])))[key] == {k.path: k.default for k in keys_of(Config)}[key]


def test_every_condition_is_tried_above() -> None:
    tried = {key for key, *_ in IGNORED}
    for path in (key.path for key in keys_of(Config) if key.section is None):
        conditional = any(path == k or path.startswith(f"{k}.") for use in USES for k in use.keys)
        assert conditional == (path in tried), path
    assert {k for use in USES for k in use.keys} <= {key.path for key in keys_of(Config)}


def test_all_keys_of_one_condition_are_named_together(tmp_path: Path) -> None:
    objective = {"sigreg": {"num_slices": 256, "scale": "reference", "reference_n": 9}, "weak_sigreg": {"sketch": 64}}
    message = error_of(written(tmp_path, {**BARE, "objective": objective}), "objective.regularizer=weak_sigreg")
    assert (
        "objective.sigreg.num_slices = 256 and objective.sigreg.scale = reference and objective.sigreg.reference_n = 9 have "
        "no effect with objective.regularizer = weak_sigreg, only where objective.regularizer is sigreg: leave them out, or "
        "set the defaults again (objective.sigreg.num_slices=1024 objective.sigreg.scale=n "
        "objective.sigreg.reference_n=256)."
    ) in message
    path = written(tmp_path, {**BARE, "objective": {"regularizer": "weak_sigreg", "sigreg": {"reference_n": 9}}})
    assert error_of(path).count("has no effect") == 1  # nothing is said of scale, which has none either


def test_an_engine_given_on_the_command_line_meets_the_keys_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, {**BARE, "engine": {"name": "zero3", "prefetch": 2}})
    assert load_config(path).engine.prefetch == 2
    message = error_of(path, "engine.name=ddp")
    assert message.startswith(f"{path} with engine.name=ddp: ")
    assert "engine.prefetch = 2 has no effect with engine.name = ddp" in message
    assert load_config(path, ["engine.name=ddp", "engine.prefetch=1"]).engine.name == "ddp"


def test_waiting_for_remote_shards_limits_remote_shards_alone() -> None:
    short = merged(BARE, {"engine": {"timeout_minutes": 5}})
    validate(short)  # retries could not be lowered here: they have no effect
    with pytest.raises(
        UserError, match=r"data.retries = 5 and data.read_timeout = 30 can keep a rank waiting for 8.5 min"
    ):
        validate(merged(short, {"data": REMOTE}))


@pytest.mark.parametrize("engine", get_args(EngineName))
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_read_again_as_it_was_dumped_under_every_engine(
    path: Path, engine: str, tmp_path: Path
) -> None:
    degree = ["engine.shard_degree=null"] if engine != "fsdp" else []  # which ViT-H and ViT-G set
    whole = ["optim.name=adamw"] if engine.startswith("zero") else []  # which Muon is refused under
    config = load_config(path, [f"engine.name={engine}", *degree, *whole])
    again = tmp_path / "config.yaml"
    again.write_text(dump(config))
    assert load_config(again) == config
    assert recorded(dump(config), "config.yaml") == config


# -- groups of keys given in part


@pytest.mark.parametrize(
    ("views", "overrides", "expected"),
    [
        (None, ["data.views.global.size=32"], ((2, 32, (0.3, 1.0)), (6, 98, (0.05, 0.3)))),
        (None, ["data.views.local.count=8"], ((2, 224, (0.3, 1.0)), (8, 98, (0.05, 0.3)))),
        ({"global": {"size": 96}}, [], ((2, 96, (0.3, 1.0)), (6, 98, (0.05, 0.3)))),
        ({"global": {"size": 96}}, ["data.views.global.count=4"], ((4, 96, (0.3, 1.0)), (6, 98, (0.05, 0.3)))),
        ({"local": {"count": 0}}, ["data.views.global={count: 3}"], ((3, 224, (0.3, 1.0)), (0, 98, (0.05, 0.3)))),
        ({}, ["data.views.local.scale=[0.1, 0.2]"], ((2, 224, (0.3, 1.0)), (6, 98, (0.1, 0.2)))),
    ],
)
def test_a_view_group_may_be_given_in_part(tmp_path: Path, views: Any, overrides: list[str], expected: Any) -> None:
    tree = BARE if views is None else merged(BARE, {"data": {"views": views}})
    found = load_config(written(tmp_path, tree), overrides).data.views
    assert tuple((group.count, group.size, group.scale) for group in (found.global_, found.local)) == expected


def test_other_sections_may_be_given_in_part(tmp_path: Path) -> None:
    tree = {**BARE, "model": {"encoder": "vit_nano", "predictor": None}, "optim": None}
    overrides = ["model.predictor.hidden=7", "model.options.depth=3", "optim.lr=0.1", "objective.sigreg.knots=5"]
    config = load_config(written(tmp_path, tree), overrides)
    assert config.model.predictor
    assert (config.model.predictor.hidden, config.model.options, config.optim.lr) == (7, {"depth": 3}, 0.1)
    assert (config.objective.sigreg.knots, config.objective.sigreg.num_slices) == (5, 1024)


def test_entries_of_a_list_are_not_overridden_one_by_one(tmp_path: Path) -> None:
    for shards in ("a.tar", [{"shards": "a.tar"}, {"shards": "b.tar"}]):
        message = error_of(written(tmp_path, {**BARE, "data": {"shards": shards}}), "data.shards.0.weight=2")
        assert "the entries of a list have no keys of their own. Give all of data.shards at once" in message
    advice = re.search(r"as in (.*)\.$", message)
    assert advice
    sources = load_config(written(tmp_path, BARE), [advice[1]]).data.shards
    assert [(source.shards, source.weight) for source in sources] == [(["a.tar"], 2.0), (["b.tar"], 1.0)]


# -- the reference


def test_every_key_says_what_it_is_and_every_section_too() -> None:
    for key in keys_of(Config):
        if key.section is None or "." in key.path:
            assert key.field.description, key.path
        if key.section is not None:
            assert key.section.__doc__, key.path


def test_defaults_of_keys_are_those_of_a_configuration_without_them() -> None:
    values = dict(values_of(validate(BARE))) | {"train.steps": None}  # which BARE gives in place of train.epochs
    for key in keys_of(Config):
        if key.path in values and not key.field.is_required() and not isinstance(key.default, BaseModel):
            assert values[key.path] == key.default, key.path
    assert {key.path: key.default for key in keys_of(Config)}["data.views.local.size"] == 98


def test_the_page_of_all_keys_is_what_the_schema_says() -> None:
    from lejepa_scale.config.reference import render

    page = (ROOT / "docs/configuration.md").read_text()
    assert page == render(), "python -m lejepa_scale.config.reference > docs/configuration.md"
    assert "| `objective.sigreg.knots` | integer >= 2 | `17` | quadrature points on [0, t_max] |" in page
    assert "| `train.micro_batch` | integer > 0 | unset |" in page
    assert "| `objective.scale_centre` | `objective.visreg.weight` |" in page
    for path in (key.path for key in keys_of(Config) if "." in key.path and not key.path.startswith("data.shards.")):
        assert f"| `{path}` | " in page


def test_keys_named_in_the_documentation_exist() -> None:
    """On every page but the one of all keys; of sections whose names are not those of objects in code too."""
    known = {key.path for key in keys_of(Config)}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text() if page.name != "configuration.md" else ""
        for name in re.findall(r"`((?:run|train|objective|optim|log|probe)(?:\.[a-z_]+)+)(?:=[^`]*)?`", text):
            assert name in known or name.endswith(".py"), f"{page.name}: {name}"


def test_build_loss_hands_every_key_to_the_objective() -> None:
    from lejepa_scale.model.lejepa import build_loss
    from lejepa_scale.objective import SIGReg, VISReg, WeakSIGReg

    loss = build_loss(recorded(yaml.safe_dump({**BARE, "objective": {**FLAT, "accumulation": "micro"}}), "c"))
    sigreg = loss.regularizer
    assert isinstance(sigreg, SIGReg)
    assert (sigreg.num_slices, sigreg.knots, sigreg.dt, sigreg.estimator) == (33, 9, 4.0 / 8, "u")
    assert (sigreg.scale, sigreg.reference_n, sigreg.communication, sigreg.backend) == (
        "reference",
        64,
        "sums",
        "fused",
    )
    assert (sigreg.joint, sigreg.seed, loss.scale_centre) == (True, 0, 0.2)
    assert (loss.lambda_, loss.weighting, loss.prediction) == (0.1, "additive", "sum")
    assert build_loss(validate(BARE)).scale_centre == 0
    visreg = build_loss(validate(small_config("r", "s", objective={"regularizer": "visreg", "joint": True})))
    assert isinstance(visreg.regularizer, VISReg)
    assert (visreg.regularizer.num_slices, visreg.regularizer.joint, visreg.scale_centre) == (32, True, 1)
    weak = small_config("r", "s", objective={"regularizer": "weak_sigreg", "weak_sigreg": {"sketch": 5}})
    regularizer = build_loss(validate(weak)).regularizer
    assert isinstance(regularizer, WeakSIGReg)
    assert regularizer.sketch == 5


@pytest.mark.parametrize(
    "override", ["model.attention=sdpa", "engine.prefetch=2", "engine.compile=true", "engine.fp8=true"]
)
def test_keys_for_blocks_are_refused_for_an_encoder_without_any(tmp_path: Path, override: str) -> None:
    """Known once the encoder is built, on the meta device."""
    from lejepa_scale.model import check

    tree = small_config("r", "s", engine={"name": "fsdp", "precision": "bf16"})
    path = written(tmp_path, tree | {"model": {"encoder": "resnet10t"}})
    check(load_config(path))
    with pytest.raises(
        UserError, match=f"{override} works on the blocks of a vision transformer, and resnet10t has none"
    ):
        check(load_config(path, [override]))
    check(load_config(path, ["model.encoder=vit_nano", override]))


def test_patches_are_left_out_in_one_way_and_by_blocks_alone(tmp_path: Path) -> None:
    from lejepa_scale.model import check

    path = written(tmp_path, small_config("r", "s"))
    both = ("model.options.patch_drop_rate=0.1", "model.patch_drop.local=0.3")
    assert "model.options.patch_drop_rate = 0.1 and model.patch_drop both leave patches out" in error_of(path, *both)
    assert load_config(path, [both[0]]).model.options["patch_drop_rate"] == 0.1
    for name, value in (("global", 1.0), ("local", -0.1)):
        assert f"model.patch_drop.{name}" in error_of(path, f"model.patch_drop.{name}={value}")
    config = load_config(path, ["model.encoder=resnet10t", "model.options={}", "model.patch_drop.global=0.3"])
    with pytest.raises(
        UserError, match=r"model.patch_drop=0.3, 0 leaves patches out .*, and resnet10t has none"
    ) as caught:
        check(config)
    advice = re.findall(r"model\.patch_drop\.\w+=0(?=[ .])", str(caught.value))
    check(load_config(path, ["model.encoder=resnet10t", "model.options={}", *advice]))


def test_what_a_run_wrote_before_patches_could_be_left_out_means_the_same() -> None:
    tree = yaml.safe_load(dump(validate(BARE)))
    assert tree["model"].pop("patch_drop") == {"global": 0.0, "local": 0.0}
    assert recorded(yaml.safe_dump(tree), "config.yaml") == validate(BARE)
