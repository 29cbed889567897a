"""Whole training states in other formats and back: the same bits, read by the programs of those formats, nothing run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import small_config
from ranks import run_ranks
from safetensors.torch import load_file
from steps import start, take_step
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lejepa_scale.checkpoint import Progress, Saved, Saver, Store, find
from lejepa_scale.cli.main import main
from lejepa_scale.config import Config, dump, validate
from lejepa_scale.conversion import convert_state, open_state
from lejepa_scale.engine.base import AVERAGE
from lejepa_scale.errors import UserError
from lejepa_scale.model import build, check
from lejepa_scale.parallel import process_group
from lejepa_scale.training import loop


def config_of(run: Path, shards: Path, steps: int) -> Config:
    sections: dict[str, Any] = {"train": {"steps": steps, "global_batch": 16}, "optim": {"final_lr_ratio": 1.0}}
    return validate(small_config(run, shards, average={"kind": "ema", "every": 1}, **sections))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    folder = tmp_path_factory.mktemp("state") / "run"
    loop.train(config_of(folder, scenes, 3))
    return folder


def files(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(Path(str(find(run))).glob("*.safetensors"))}


def same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[f].keys() == b[f].keys() and all(torch.equal(a[f][n], b[f][n]) for n in a[f]) for f in a
    )


@pytest.mark.parametrize("kind", ["dcp", "zero"])
def test_there_and_back_are_the_same_bits_and_the_run_goes_on(
    run: Path, scenes: Path, tmp_path: Path, kind: str
) -> None:
    assert main(["convert", str(run), str(tmp_path / "there"), "--to", kind]) == 0
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--to", "lejepa"]) == 0
    before, after = files(run), files(tmp_path / "back")
    probe = before.pop("probe.safetensors")
    assert probe  # which is not part of another trainer's state: it begins anew
    assert same(before, after)
    assert {*after} == {"model.safetensors", "optimizer.safetensors", "average.safetensors"}
    loop.train(config_of(tmp_path / "back", scenes, 5))
    loop.train(config_of(tmp_path / "whole", scenes, 5))
    ended = [files(tmp_path / name) for name in ("back", "whole")]
    assert same(*({k: v for k, v in found.items() if k != "probe.safetensors"} for found in ended))


def test_muons_state_there_and_back_and_as_torch_names_it(tmp_path: Path) -> None:
    """And DeepSpeed's format, which has no place for it, is refused."""
    config = validate(small_config(tmp_path / "run", "s", optim={"name": "muon"}))
    engine, plan = start(config)
    take_step(engine, plan, [[torch.randn(2, 16, 3, 32, 32)]])
    saver = Saver(Store(tmp_path / "run", keep=1), engine)
    saver.begin(Progress(1, "shards"), {}, dump(config))
    saver.finish()
    convert_state(open_state(tmp_path / "run"), tmp_path / "dcp", "dcp")
    convert_state(open_state(tmp_path / "dcp"), tmp_path / "back", "lejepa")
    assert same(files(tmp_path / "run"), files(tmp_path / "back"))
    saved = Saved(find(tmp_path / "back"))
    name = "encoder.backbone.blocks.0.attn.qkv.weight"
    assert saved.moments[name] == ("momentum_buffer",)
    start(config, saved=saved)
    state = {"optim": {"state": {name: {"momentum_buffer": torch.zeros(saved.shapes[name])}}}}
    torch_dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(state["optim"]["state"][name]["momentum_buffer"], saved.whole(name, "momentum_buffer"))
    with pytest.raises(UserError, match=r"optim\.name=muon, .* convert it --to dcp"):
        convert_state(open_state(tmp_path / "run"), tmp_path / "zero", "zero")
    assert not (tmp_path / "zero").exists()


def test_torch_reads_what_is_written(run: Path, tmp_path: Path) -> None:
    """By its own `load` and its own converter."""
    convert_state(open_state(run), tmp_path / "dcp", "dcp")
    saved = Saved(find(run))
    name = "encoder.backbone.blocks.0.attn.qkv.weight"
    state = {
        "model": {name: torch.zeros(saved.shapes[name])},
        "optim": {"state": {name: {"exp_avg": torch.zeros(saved.shapes[name]), "step": torch.tensor(0.0)}}},
    }
    torch_dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(state["model"][name], saved.whole(name))
    assert torch.equal(state["optim"]["state"][name]["exp_avg"], saved.whole(name, "exp_avg"))
    assert state["optim"]["state"][name]["step"] == 3
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "all.pt")
    whole = torch.load(tmp_path / "all.pt", weights_only=True)
    assert {*whole} == {"model", "optim", "average"}
    assert {*whole["model"]} == {*saved.shapes}
    assert all(torch.equal(tensor, saved.whole(key)) for key, tensor in whole["model"].items())
    assert all(torch.equal(tensor, saved.whole(key, AVERAGE)) for key, tensor in whole["average"].items())


def _saved_by_torch(folder: str, run: str) -> None:
    """The state of a run under plain FSDP2 and torch's own `save`, of every rank its shards."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    from lejepa_scale.config import load_config

    config = load_config(Path(run) / "config.yaml", ["engine.name=fsdp"])
    engine, plan = start(config, saved=Saved(find(run)))
    views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rank = process_group.rank()
    take_step(engine, plan, [[views[:, rank * plan.micro_batch :][:, : plan.micro_batch]]], 3)
    state: dict[str, Any] = {
        "model": get_model_state_dict(engine.module),
        "optim": get_optimizer_state_dict(engine.module, engine.optimizer),  # type: ignore[attr-defined]
    }
    torch_dcp.save(state, checkpoint_id=folder)
    from lejepa_scale.checkpoint import Progress, Saver

    saver = Saver(Store(Path(folder).parent / "ours", keep=1), engine)
    saver.begin(Progress(4, "x"), {}, dump(config))
    saver.finish()
    engine.close()


def test_what_torch_has_saved_of_two_ranks_is_read(run: Path, tmp_path: Path) -> None:
    """Shards of every parameter, in the files of two ranks, against our own checkpoint of the same engine."""
    run_ranks(_saved_by_torch, 2, str(tmp_path / "dcp"), str(run))
    with pytest.raises(UserError, match=r"holds no state\.json and config\.yaml of a run"):
        open_state(tmp_path / "dcp")
    for name in ("state.json", "config.yaml"):
        (tmp_path / "dcp" / name).write_text((Path(str(find(run))) / name).read_text())
    state, ours = open_state(tmp_path / "dcp"), Saved(find(tmp_path / "ours"))
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    for kind, name, lazy in state.each():
        assert torch.equal(lazy.read(), ours.whole(name, kind)), (kind, name)
    assert {name for kind, name, _ in state.each() if kind == "value"} == {*ours.shapes}
    assert {name for kind, name, _ in state.each() if kind == "exp_avg"} == {*ours.parameters}


def _loaded_by_deepspeed(folder: str, run: str, stage: int) -> Any:
    """What plain DeepSpeed makes of a universal checkpoint, on this rank, and the loss of a step from it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from lejepa_scale.config import load_config
    from lejepa_scale.model import build

    world, rank = process_group.world_size(), process_group.rank()
    settings = {
        "train_batch_size": 16,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "checkpoint": {"load_universal": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    module = build(load_config(Path(run) / "config.yaml", []))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    tensors = {}
    for name, parameter in module.named_parameters():
        tensors["value", name] = safe_get_full_fp32_param(parameter).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[kind, name] = safe_get_full_optimizer_state(parameter, kind).clone()
    views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = engine([views[:, rank * 16 // world :][:, : 16 // world]], 3)["loss"]
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values() if "step" in state}
    result = tensors, float(loss), engine.global_steps, steps
    engine.destroy()
    return result


def _loss_of_ours(run: str, engine: str = "single", number: int = 3) -> float:
    from lejepa_scale.config import load_config

    made, plan = start(load_config(Path(run) / "config.yaml", [f"engine.name={engine}"]), saved=Saved(find(run)))
    views, rank = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0)), process_group.rank()
    loss = float(take_step(made, plan, [[views[:, rank * plan.micro_batch :][:, : plan.micro_batch]]], number).loss)
    made.close()
    return loss


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_plain_deepspeed_goes_on(run: Path, tmp_path: Path, stage: int) -> None:
    """On two ranks: every weight and moment bit for bit, the number of updates, and the loss of the next step."""
    pytest.importorskip("deepspeed")
    convert_state(open_state(run), tmp_path / "zero", "zero")
    saved = Saved(find(run))
    expected = run_ranks(_loss_of_ours, 1, str(run))[0]
    for tensors, loss, step, updates in run_ranks(_loaded_by_deepspeed, 2, str(tmp_path / "zero"), str(run), stage):
        assert {name for _, name in tensors} == {*saved.parameters}
        for (kind, name), tensor in tensors.items():
            assert torch.equal(tensor.view(-1), saved.whole(name, kind).view(-1)), (kind, name)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert step == 3
        assert updates == {3.0}


def _by_deepspeed_alone(folder: str, config: str, stage: int) -> Any:
    """Two steps of a run that is none of ours, saved as DeepSpeed does; what it holds, and the loss of the third."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from lejepa_scale.config import load_config
    from lejepa_scale.model import build

    world, rank = process_group.world_size(), process_group.rank()
    settings = {
        "train_batch_size": 16,
        "zero_optimization": {"stage": stage, "sub_group_size": 20_000, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    module = build(load_config(Path(config), []))
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in module.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": matrices}], lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))[:, rank * 16 // world :][
        :, : 16 // world
    ]
    for step in range(2):
        engine.backward(engine([views], step)["loss"])
        engine.step()
    engine.save_checkpoint(folder)
    if stage < 3:  # DeepSpeed links moments to parameters after the first group's first update, and those of no other
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors = {}
    for name, parameter in module.named_parameters():
        tensors["value", name] = safe_get_full_fp32_param(parameter).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[kind, name] = safe_get_full_optimizer_state(parameter, kind).clone()
    loss = float(engine([views], 2)["loss"])
    engine.destroy()
    return tensors, loss


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_a_run_of_plain_deepspeed_becomes_one_of_ours(tmp_path: Path, scenes: Path, stage: int) -> None:
    """Two ranks' flat partitions, in groups of parameters that are not in the module's order, into a checkpoint that fsdp
    goes on from on two ranks."""
    pytest.importorskip("deepspeed")
    config = tmp_path / "recipe.yaml"
    config.write_text(dump(validate(small_config(tmp_path / "back", scenes, train={"steps": 4, "global_batch": 16}))))
    found = run_ranks(_by_deepspeed_alone, 2, str(tmp_path / "theirs"), str(config), stage)
    with pytest.raises(UserError, match=r"or name its configuration with --config"):
        open_state(tmp_path / "theirs")
    words = ["convert", str(tmp_path / "theirs"), str(tmp_path / "back"), "--to", "lejepa", "--config", str(config)]
    assert main(words) == 0
    saved = Saved(find(tmp_path / "back"))
    assert (saved.progress.step, saved.progress.updates) == (2, 2)
    for tensors, loss in found:
        assert {name for _, name in tensors} == {*saved.parameters}
        for (kind, name), tensor in tensors.items():
            assert torch.equal(tensor.view(-1), saved.whole(name, kind).view(-1)), (kind, name)
        losses = run_ranks(_loss_of_ours, 2, str(tmp_path / "back"), "fsdp", 2)
        assert losses == pytest.approx([loss, loss], rel=1e-5)
    loop.train(validate(small_config(tmp_path / "back", scenes, train={"steps": 4, "global_batch": 16})))
    assert Saved(find(tmp_path / "back")).progress.step == 4
    next((tmp_path / "theirs/global_step2").glob("*pp_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(UserError, match=r"holds the partitions of 1 ranks, of the 2 that wrote it"):
        open_state(tmp_path / "theirs", config)


def test_weights_without_an_optimizer_begin_a_new_one(tmp_path: Path, scenes: Path) -> None:
    """As a model alone is saved by torch: running statistics stay what they are, and the first update is the first."""
    config = validate(
        small_config(tmp_path / "back", scenes, model={"encoder": "resnet10t", "options": {}}, train={"steps": 2})
    )
    (tmp_path / "recipe.yaml").write_text(dump(config))
    module = check(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(t.shape, generator=generator) + 0.1 if t.is_floating_point() else t.zero_()
        for name, t in module.state_dict().items()
    }
    torch_dcp.save({"model": state}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    words = ["convert", str(tmp_path / "theirs"), str(tmp_path / "back"), "--to", "lejepa"]
    assert main([*words, "--config", str(tmp_path / "recipe.yaml")]) == 0
    saved = Saved(find(tmp_path / "back"))
    assert {*saved.buffers} == {name for name, _ in module.named_buffers()}
    assert any("running_mean" in name for name in saved.buffers)
    assert (saved.progress.step, saved.progress.updates, bool(saved.moments)) == (0, 0, False)
    assert all(torch.equal(saved.whole(name), tensor) for name, tensor in state.items())
    loop.train(config)
    assert (Saved(find(tmp_path / "back")).progress.step, Saved(find(tmp_path / "back")).progress.updates) == (2, 2)


def test_an_encoder_begins_a_run_and_comes_out_the_same(run: Path, tmp_path: Path, scenes: Path) -> None:
    """timm -> lejepa -> timm: the same bits; the projector is the one that the seed draws."""
    assert main(["convert", str(run), str(tmp_path / "timm"), "--weights", "trained"]) == 0
    config = config_of(tmp_path / "ours", scenes, 2)
    (tmp_path / "recipe.yaml").write_text(dump(config))
    words = ["convert", str(tmp_path / "timm"), str(tmp_path / "ours"), "--to", "lejepa"]
    assert main(words) == 2
    torch.manual_seed(12345)  # from which nothing is drawn
    assert main([*words, "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("timm", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.manual_seed(config.run.seed)
    drawn = build(config).projector.state_dict()
    saved = Saved(find(tmp_path / "ours"))
    assert all(torch.equal(saved.whole(f"projector.{name}"), tensor) for name, tensor in drawn.items())
    loop.train(config)
    assert Saved(find(tmp_path / "ours")).progress.step == 2
    other = small_config(tmp_path / "other", scenes, model={"options": {"depth": 3}})
    (tmp_path / "recipe.yaml").write_text(dump(validate(other)))
    assert main([*words[:2], str(tmp_path / "other"), *words[3:], "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert not (tmp_path / "other").exists()


def test_a_state_of_another_model_is_refused(run: Path, tmp_path: Path, scenes: Path) -> None:
    convert_state(open_state(run), tmp_path / "dcp", "dcp")
    other = small_config("r", scenes, model={"encoder": "vit_nano", "options": {"depth": 3}})
    (tmp_path / "dcp/config.yaml").write_text(dump(validate(other)))
    with pytest.raises(UserError, match=r"is not a state of the configured model: \d+ tensors are missing, left over"):
        convert_state(open_state(tmp_path / "dcp"), tmp_path / "back", "lejepa")


class _Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def _text(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def _bytes(name: str, of: Any) -> Any:
    return lambda folder: (folder / name).write_bytes(of((folder / name).read_bytes()))


DAMAGE: dict[str, tuple[Any, str]] = {
    "metadata that run something": (
        _bytes(".metadata", lambda _: pickle.dumps(_Runs())),
        "would run code: it names pathlib",
    ),
    "metadata of something else": (
        _bytes(".metadata", lambda _: pickle.dumps({"a": 1})),
        "does not describe a checkpoint",
    ),
    "metadata cut short": (_bytes(".metadata", lambda data: data[:99]), "cannot be read"),
    "metadata of zeros": (_bytes(".metadata", lambda _: bytes(200)), "cannot be read|would run"),
    "empty metadata": (_bytes(".metadata", lambda _: b""), "cannot be read"),
    "no data": (
        lambda f: (f / "__0_0.distcp").unlink(),
        r"__0_0\.distcp, which holds a part of .* is not there or too short",
    ),
    "data cut short": (_bytes("__0_0.distcp", lambda data: data[:5000]), "is not there or too short"),
    "state.json that is no text": (_bytes("state.json", lambda _: b"\xff\xfe"), r"damaged state\.json or config\.yaml"),
    "config.yaml cut short": (_text("config.yaml", "run: ["), r"config\.yaml cannot be read, it is not valid YAML"),
    "no state.json": (lambda f: (f / "state.json").unlink(), r"holds no state\.json and config\.yaml"),
    "no config.yaml": (lambda f: (f / "config.yaml").unlink(), r"holds no state\.json and config\.yaml"),
    "state.json of something else": (_text("state.json", "[1]"), r"holds no state\.json"),
    "state.json without a step": (_text("state.json", json.dumps({"data_fingerprint": "x"})), r"holds no state\.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_and_foreign_states(run: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert_state(open_state(run), tmp_path / "dcp", "dcp")
    damage, says = DAMAGE[case]
    damage(tmp_path / "dcp")
    with pytest.raises(UserError, match=says):
        convert_state(open_state(tmp_path / "dcp"), tmp_path / "back", "lejepa")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_data_that_are_no_tensors_are_not_unpickled(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of one tensor's bytes, as many of a pickle that runs something."""
    import io

    monkeypatch.chdir(tmp_path)
    convert_state(open_state(run), tmp_path / "dcp", "dcp")
    buffer = io.BytesIO()
    torch.save(_Runs(), buffer)
    path = tmp_path / "dcp/__0_0.distcp"
    path.write_bytes(buffer.getvalue() + path.read_bytes()[len(buffer.getvalue()) :])
    with pytest.raises(UserError, match=r"__0_0\.distcp: what lies at 0 cannot be read"):
        convert_state(open_state(tmp_path / "dcp"), tmp_path / "back", "lejepa")
    assert not (tmp_path / "ran").exists()


def test_what_deepspeed_did_not_write_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes are stood in for; any other name is refused."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "global_step1"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"optimizer_state_dict": _Runs()}, folder / name)
    with pytest.raises(UserError, match=r"reading \S*model_states\.pt would run code that it names"):
        open_state(folder)
    assert not (tmp_path / "ran").exists()


def test_options_of_encoders_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["--heads"],
        ["--dtype", "bf16"],
        ["--verify"],
        ["--weights", "trained"],
        ["--max-shard-size", "1GB"],
    ):
        assert main(["convert", str(run), str(tmp_path / "x"), "--to", "dcp", *options]) == 2
        assert "is for encoders: --to dcp writes the whole training state" in capsys.readouterr().err
