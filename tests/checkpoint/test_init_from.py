"""Weights that a run begins with: from every kind of source the same tensors, as timm itself would load them; nothing stays
at random without a word, and refusals name what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import small_config
from ranks import run_ranks
from safetensors.torch import save_file
from saving import Holder, exported
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv, load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from lejepa_scale.checkpoint import Progress, Saver, Store, gather, load_encoder, pretrained, sources
from lejepa_scale.config import Config, check_world, dump, validate
from lejepa_scale.config.schema import InitFrom
from lejepa_scale.errors import UserError
from lejepa_scale.evaluation import Options, evaluate
from lejepa_scale.model import Encoder, build, check
from lejepa_scale.parallel import process_group
from lejepa_scale.training.loop import train
from lejepa_scale.training.start import first_weights, start_engine

Tensors = dict[str, Tensor]
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(image_size: int = 32, channels: int = 3, **options: Any) -> Encoder:
    return Encoder("vit_nano", image_size=image_size, channels=channels, options={**SMALL, **options})


def other_weights(encoder: Encoder) -> Tensors:
    """Weights of the encoder's shapes that it does not have."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(t.shape, generator=generator) if t.is_floating_point() else torch.full_like(t, 5)
        for name, t in encoder.backbone.state_dict().items()
    }


def load(source: Path | str, encoder: Encoder, **settings: Any) -> pretrained.Loaded:
    return pretrained.load(InitFrom(source=str(source), **settings), encoder)


def refused(source: Path | str, encoder: Encoder, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, encoder, **settings)
    message = str(caught.value)
    assert message.startswith(f"model.init_from={source}: ")
    assert "\n" not in message
    assert len(message) < 1200
    return message


def equal(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def under(prefix: str, weights: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


# -- kinds of sources


def _safetensors(folder: Path, weights: Tensors) -> Path:
    save_file(weights, folder / "w.safetensors")
    return folder / "w.safetensors"


def _pth(folder: Path, weights: Tensors) -> Path:
    torch.save(weights, folder / "w.pth")
    return folder / "w.pth"


def _legacy_pth(folder: Path, weights: Tensors) -> Path:
    torch.save(weights, folder / "w.pth", _use_new_zipfile_serialization=False)
    return folder / "w.pth"


def _lightning(folder: Path, weights: Tensors) -> Path:
    heads = {"projector.0.weight": torch.zeros(2, 2)}
    torch.save(
        {"epoch": 3, "state_dict": under("model.backbone.", weights) | heads, "optimizer_states": [{"lr": 0.1}]},
        folder / "last.ckpt",
    )
    return folder / "last.ckpt"


def _compiled_ddp(folder: Path, weights: Tensors) -> Path:
    torch.save({"model": under("module._orig_mod.", weights)}, folder / "w.pt")
    return folder / "w.pt"


def _folder_of_one(folder: Path, weights: Tensors) -> Path:
    _pth(folder, weights)
    return folder


def _hugging_face(folder: Path, weights: Tensors) -> Path:
    """As TimmWrapperModel.save_pretrained writes it."""
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 0}))
    save_file(under("timm_model.", weights), folder / "model.safetensors", {"format": "pt"})
    return folder


def _hugging_face_bin(folder: Path, weights: Tensors) -> Path:
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def _sharded(folder: Path, weights: Tensors) -> Path:
    names = sorted(weights)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


KINDS = [
    _safetensors, _pth, _legacy_pth, _lightning, _compiled_ddp, _folder_of_one, _hugging_face, _hugging_face_bin, _sharded,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_its_tensors(kind: Callable[[Path, Tensors], Path], tmp_path: Path) -> None:
    encoder = vit()
    weights = other_weights(encoder)
    loaded = load(kind(tmp_path, weights), encoder)
    assert equal(loaded.weights, weights)
    assert f"{len(weights)} of {len(weights)} tensors of vit_nano from {tmp_path}" in loaded.line


def test_the_line_says_what_was_stripped_and_what_is_not_used(tmp_path: Path) -> None:
    encoder = vit()
    line = load(_lightning(tmp_path, other_weights(encoder)), encoder).line
    assert "(state_dict of the file; prefix model.backbone. stripped; 1 other tensors of the file not used; " in line


@pytest.mark.parametrize("name", ["resnet10t", "eva02_tiny_patch14_224"])
def test_buffers_and_other_architectures(name: str, tmp_path: Path) -> None:
    encoder = Encoder(name, image_size=28, options={"depth": 1} if "eva" in name else {"channels": [8, 8, 8, 16]})
    weights = other_weights(encoder)
    loaded = load(_pth(tmp_path, weights), encoder).weights
    assert equal(loaded, weights)
    if name == "resnet10t":
        assert int(loaded["bn1.num_batches_tracked"]) == 5
        assert loaded["bn1.num_batches_tracked"].dtype == torch.int64


def _saved(folder: Path) -> tuple[Config, Tensors]:
    """A run with one checkpoint."""
    config = validate(small_config(folder, "s.tar", model={"options": SMALL}))
    weights = {name: tensor.detach() for name, tensor in build(config).state_dict().items()}
    saver = Saver(Store(folder, 1), Holder({"value": weights}, updates=0))
    saver.begin(Progress(1, "shards"), {}, dump(config))
    saver.finish()
    return config, {n.removeprefix("encoder.backbone."): t for n, t in weights.items() if n.startswith("encoder.")}


def test_our_runs_checkpoints_and_exports(tmp_path: Path) -> None:
    config, weights = _saved(tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "encoder.safetensors")
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    torch.manual_seed(1)
    encoder = check(config).encoder
    for source in (tmp_path / "run", checkpoint, checkpoint / "model.safetensors", tmp_path / "encoder.safetensors"):
        assert equal(load(source, encoder).weights, weights), source
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "is corrupt" in refused(tmp_path / "run", encoder)


def test_a_tag_is_fetched_by_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder("resnet10t")
    weights = other_weights(encoder)
    asked = []

    def stored(repository: str, **arguments: Any) -> Tensors:
        asked.append(repository)
        return weights | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}

    monkeypatch.setattr(sources, "load_state_dict_from_hf", stored)
    for name in ("timm:resnet10t.c3_in1k", "timm:resnet10t"):
        loaded = load(name, encoder)
        assert equal(loaded.weights, weights)
        assert "classifier not used: fc.weight, fc.bias" in loaded.line
    assert asked == ["timm/resnet10t.c3_in1k"] * 2
    assert "near it: resnet10t.c3_in1k" in refused("timm:resnet10t.c3_in21k", encoder)
    assert "released no weights" in refused("timm:vit_nano", encoder)

    def offline(repository: str, **arguments: Any) -> Tensors:
        raise OSError("no network")

    monkeypatch.setattr(sources, "load_state_dict_from_hf", offline)
    message = refused("timm:resnet10t", encoder)
    assert "could not be fetched (no network)" in message
    assert "hf download timm/resnet10t.c3_in1k" in message


def test_weights_that_learned_on_other_inputs_are_named(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The values of a tag are those by which timm's own transforms standardize; what the warning says is right ends it."""
    encoder = Encoder("vit_tiny_patch16_224", image_size=224, options={"depth": 1})
    monkeypatch.setattr(sources, "load_state_dict_from_hf", lambda *_, **__: other_weights(encoder))
    for tag in ("vit_tiny_patch16_224.augreg_in21k", "resnet50_clip.openai", "resnet10t.c3_in1k"):
        truth = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(tag).to_dict())
        assert sources.read(f"timm:{tag}").standardization == (list(truth["mean"]), list(truth["std"])), tag

    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]}
    (tmp_path / "hf").mkdir()
    folder = _hugging_face(tmp_path / "hf", other_weights(vit()))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"pretrained_cfg": half}))
    train(validate(_run(tmp_path / "run", scenes, folder, train={"steps": 1, "global_batch": 16})))
    said = "data.mean=[0.5, 0.5, 0.5] data.std=[0.5, 0.25, 0.5] give them theirs"
    assert said in caplog.text
    exported(tmp_path / "run", tmp_path / "encoder.safetensors")
    for source in (tmp_path / "run", tmp_path / "encoder.safetensors"):
        assert load(source, vit()).standardization == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    caplog.clear()
    short = {"steps": 1, "global_batch": 16}
    train(validate(_run(tmp_path / "again", scenes, folder, data=half, train=short)))
    train(validate(_run(tmp_path / "more", scenes, tmp_path / "again", data=half, train=short)))
    assert "give them theirs" not in caplog.text
    assert load(_pth(tmp_path, other_weights(vit())), vit()).standardization is None


# -- what is made of names, sizes and precision


def test_another_grid_and_patch_are_resized_as_timm_does(tmp_path: Path) -> None:
    source, encoder = vit(64, patch_size=16), vit(48)
    weights = other_weights(source)
    loaded = load(_pth(tmp_path, weights), encoder)
    plain = timm.create_model(**encoder.timm_arguments)
    load_checkpoint(plain, str(tmp_path / "w.pth"), filter_fn=checkpoint_filter_fn)
    assert equal(loaded.weights, plain.state_dict())
    assert torch.equal(loaded.weights["pos_embed"], resample_abs_pos_embed(weights["pos_embed"], new_size=[6, 6]))
    assert "pos_embed resized from 1 x 17 x 32 to 1 x 37 x 32" in loaded.line
    assert "patch_embed.proj.weight resized from 32 x 3 x 16 x 16 to 32 x 3 x 8 x 8" in loaded.line


def test_a_grid_that_is_not_square_is_told_by_the_folder(tmp_path: Path) -> None:
    """16 patches: 2 rows of 8."""
    encoder = vit(32)
    weights = other_weights(encoder)
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"img_size": [16, 64]}}))
    loaded = load(_hugging_face_bin(tmp_path, weights), encoder)
    expected = resample_abs_pos_embed(weights["pos_embed"], new_size=[4, 4], old_size=[2, 8])
    assert torch.equal(loaded.weights["pos_embed"], expected)
    assert not torch.equal(expected, weights["pos_embed"])


def test_channels_are_adapted_as_timm_does(tmp_path: Path) -> None:
    source = vit(channels=1)
    weights = other_weights(source)
    loaded = load(_pth(tmp_path, weights), vit())
    name = "patch_embed.proj.weight"
    assert torch.equal(loaded.weights[name], adapt_input_conv(3, weights[name], base_chans=1))
    torch.testing.assert_close(loaded.weights[name].sum(1), weights[name][:, 0])
    assert f"{name} adapted from 1 to 3 channels" in loaded.line


def test_low_precision_becomes_fp32(tmp_path: Path) -> None:
    encoder = vit()
    weights = {name: tensor.bfloat16() for name, tensor in other_weights(encoder).items()}
    loaded = load(_safetensors(tmp_path, weights), encoder)
    assert equal(loaded.weights, {name: tensor.float() for name, tensor in weights.items()})
    assert "bfloat16 made float32" in loaded.line


def test_the_published_names_of_dinov2(tmp_path: Path) -> None:
    """timm's conversion drops the mask token; that is said."""
    encoder = vit(init_values=1e-5)
    weights = other_weights(encoder)
    published = weights | {"mask_token": torch.zeros(1, 32)}
    torch.save(
        {"teacher": under("backbone.", published) | {"dino_head.last.weight": torch.ones(3)}}, tmp_path / "w.pth"
    )
    loaded = load(tmp_path / "w.pth", encoder)
    assert equal(loaded.weights, weights)
    assert "merged or not used by timm's conversion: mask_token" in loaded.line


def test_what_timm_renames_is_left_out_by_the_names_of_both_sides(tmp_path: Path) -> None:
    """DINOv2's register_tokens are timm's reg_token, and the position of its class token is added to that."""
    encoder = vit(reg_tokens=2, no_embed_class=True)
    weights = other_weights(encoder)
    rest = {name: tensor for name, tensor in weights.items() if name != "reg_token"}
    positions = torch.cat([torch.zeros(1, 1, 32), weights["pos_embed"]], 1)
    renamed = {"register_tokens": weights["reg_token"], "mask_token": torch.zeros(1, 32), "pos_embed": positions}
    _pth(tmp_path, rest | renamed)
    assert equal(load(tmp_path / "w.pth", encoder).weights, weights)
    assert "1 missing (reg_token)" in refused(tmp_path / "w.pth", encoder, leave_out=["register_tokens"])
    loaded = load(tmp_path / "w.pth", encoder, leave_out=["register_tokens", "reg_token"])
    assert equal(loaded.weights, rest)
    assert "left out: register_tokens; left at random: reg_token" in loaded.line


# -- which set is meant


def test_student_and_teacher_are_told_apart_by_key(tmp_path: Path) -> None:
    encoder = vit()
    student, teacher = other_weights(encoder), {n: t + 1 for n, t in other_weights(encoder).items()}
    tree = {"student": under("module.backbone.", student), "teacher": under("backbone.", teacher), "epoch": 1}
    torch.save(tree, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth", encoder)
    assert "2 sets of weights in it fit. Set model.init_from.key to one of student, teacher." in message
    assert equal(load(tmp_path / "w.pth", encoder, key="teacher").weights, teacher)
    assert equal(load(tmp_path / "w.pth", encoder, key="student").weights, student)
    assert "key=ema; there is student, teacher" in refused(tmp_path / "w.pth", encoder, key="ema")


@pytest.mark.parametrize(("first", "second"), [("student.", "teacher."), ("", "ema.")])
def test_student_and_teacher_are_told_apart_by_prefix(first: str, second: str, tmp_path: Path) -> None:
    encoder = vit()
    weights, others = other_weights(encoder), {n: t + 1 for n, t in other_weights(encoder).items()}
    _pth(tmp_path, under(first, weights) | under(second, others))
    named = f"{first or repr('')}, {second}"
    assert f"model.init_from.prefix to one of {named}." in refused(tmp_path / "w.pth", encoder)
    assert equal(load(tmp_path / "w.pth", encoder, prefix=first).weights, weights)
    assert equal(load(tmp_path / "w.pth", encoder, prefix=second.rstrip(".")).weights, others)
    assert "begins with model.init_from.prefix=nobody" in refused(tmp_path / "w.pth", encoder, prefix="nobody")


# -- names on one side, shapes that differ


def test_missing_and_unexpected_names_are_refused_and_may_be_left_out(tmp_path: Path) -> None:
    encoder = vit()
    weights = other_weights(encoder)
    given = {n: t for n, t in weights.items() if n != "cls_token"} | {"extra.weight": torch.zeros(2)}
    message = refused(_pth(tmp_path, given), encoder)
    assert "1 missing (cls_token), 1 unexpected (extra.weight)" in message
    assert "model.init_from.leave_out" in message
    loaded = load(tmp_path / "w.pth", encoder, leave_out=["cls_token", "extra"])
    assert equal(loaded.weights, {n: t for n, t in weights.items() if n != "cls_token"})
    assert "left out: extra.weight; left at random: cls_token" in loaded.line
    message = refused(tmp_path / "w.pth", encoder, leave_out=["cls_token", "extra", "cls_tokens", "blocks.9.*"])
    assert "leave_out=cls_tokens, blocks.9.* matches no tensor" in message


def test_a_pattern_leaves_out_what_both_sides_have(tmp_path: Path) -> None:
    encoder = vit()
    weights = other_weights(encoder)
    loaded = load(_pth(tmp_path, weights), encoder, leave_out=["blocks.*.mlp.*", "norm"])
    assert equal(loaded.weights, {n: t for n, t in weights.items() if ".mlp." not in n and not n.startswith("norm.")})


def test_a_head_of_another_width_is_left_out_by_name(tmp_path: Path) -> None:
    source, encoder = (Encoder("vit_nano", image_size=48, head_dim=n, options=dict(SMALL)) for n in (10, 7))
    weights = other_weights(source)
    message = refused(_pth(tmp_path, weights), encoder)
    assert "head.weight: 10 x 32 in the source, 7 x 32 in the encoder" in message
    loaded = load(tmp_path / "w.pth", encoder, leave_out=["head"])
    assert equal(loaded.weights, {n: t for n, t in weights.items() if not n.startswith("head.")})
    assert "left at random: head.weight, head.bias" in loaded.line


def test_other_shapes_are_refused_with_both(tmp_path: Path) -> None:
    message = refused(_pth(tmp_path, other_weights(vit())), vit(mlp_ratio=2.0))
    assert "6 of another shape (blocks.0.mlp.fc1.bias: 128 in the source, 64 in the encoder; " in message
    assert "blocks.0.mlp.fc1.weight: 128 x 32 in the source, 64 x 32 in the encoder" in message
    assert "Set model.encoder, model.patch_size and model.options" in message


def test_another_architecture_has_a_short_message(tmp_path: Path) -> None:
    weights = other_weights(Encoder("resnet10t"))
    _pth(tmp_path, weights)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t"}))
    message = refused(tmp_path, vit())
    assert "it holds resnet10t, which is another model than model.encoder=vit_nano" in message
    assert len(message) < 400 + len(str(tmp_path))


def test_native_names_of_transformers_are_refused_in_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Dinov2Model"]}))
    names = ("embeddings.cls_token", "embeddings.patch_embeddings.projection.weight", "encoder.layer.0.norm1.weight")
    save_file({name: torch.zeros(1, 1, 32) for name in names}, tmp_path / "model.safetensors")
    message = refused(tmp_path, vit())
    assert "it holds Dinov2Model, which has the names that transformers gives its own classes" in message
    assert f"`lejepa convert {tmp_path} encoder` makes a folder under timm's names" in message


# -- files that cannot be used


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    encoder = vit()
    weights = other_weights(encoder)
    weights["norm.weight"][3] = float("nan")
    assert "1 of 32 values of norm.weight are not finite" in refused(_pth(tmp_path, weights), encoder)


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    tree = {"state_dict": other_weights(vit()), "hook": _Malicious(tmp_path / "harm")}
    torch.save(tree, tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / "w.ckpt", vit())
    assert "would run code that it names (posix.mkdir)" in message
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_file_is_refused(kind: Callable[[Path, Tensors], Path], tmp_path: Path) -> None:
    source = kind(tmp_path, other_weights(vit()))
    file = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert str(file) in refused(source, vit())


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("version https://git-lfs.github.com/spec/v1")
    assert str(tmp_path / "w.pth") in refused(tmp_path / "w.pth", vit())
    torch.save({"epoch": 1}, tmp_path / "w.pth")
    assert "holds no named tensors" in refused(tmp_path / "w.pth", vit())
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in refused(tmp_path / "empty", vit())
    assert "there is no such file or folder" in refused(tmp_path / "nothing", vit())
    assert "model.init_from=timm:resnet10t" in refused("resnet10t", vit())


def test_a_sharded_folder_must_hold_what_its_index_names(tmp_path: Path) -> None:
    folder, weights = tmp_path / "hf", other_weights(vit())
    folder.mkdir()
    _sharded(folder, weights)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": listed | {"more": "model-1-of-2.safetensors"}}))
    assert "1 tensors that" in (message := refused(folder, vit()))
    assert "are in none of its files: more" in message
    _safetensors(tmp_path, weights)
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../w.safetensors"}}))
    assert "names ../w.safetensors, which is not in the folder" in refused(folder, vit())
    index.write_text(json.dumps({"weight_map": listed}))
    (folder / "model-2-of-2.safetensors").unlink()
    assert "names model-2-of-2.safetensors, which is not in the folder" in refused(folder, vit())
    index.write_text("{")
    assert f"cannot read {index}" in refused(folder, vit())


# -- in a run


def _run(run: Path, scenes: Path, source: Path | str, **sections: Any) -> dict[str, Any]:
    return small_config(run, scenes, model={"options": SMALL, "init_from": str(source)}, **sections)


def _on_ranks(tree: dict[str, Any]) -> tuple[Tensors | None, int]:
    """The engine's weights, gathered, and how many tensors this rank read."""
    config = validate(tree)
    plan = check_world(config, process_group.world_size())
    begin = first_weights(config, Store(config.run.dir, 1), check(config))
    state = gather(start_engine(config, plan, torch.device("cpu"), begin=begin))
    return (None if state is None else dict(state.model)), len(begin)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_ranks_receive_the_weights(engine: str, tmp_path: Path) -> None:
    weights = other_weights(vit())
    (first, read), (_, none) = run_ranks(
        _on_ranks, 2, _run(tmp_path / "run", "s", _pth(tmp_path, weights), engine={"name": engine})
    )
    assert (read, none) == (len(weights), 0)
    assert equal({n: first[f"encoder.backbone.{n}"].cpu() for n in weights}, weights)


def _message(tree: dict[str, Any]) -> str:
    config = validate(tree)
    with pytest.raises(UserError) as caught:
        first_weights(config, Store(config.run.dir, 1), check(config))
    return str(caught.value)


def test_a_refusal_ends_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(_message, 2, _run(tmp_path / "run", "s", tmp_path / "nothing"))
    assert first == second
    assert "there is no such file or folder" in first


def _rows(run: Path, shards: str) -> list[str]:
    found = evaluate(run, shards, shards, options=Options(("knn",)))
    return list(dict.fromkeys(row.subject for row in found.results))


def test_a_run_begins_there_and_goes_on_without_opening_the_file(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    weights = other_weights(vit())
    source, run = _pth(tmp_path, weights), tmp_path / "run"
    rates = {"optim": {"lr": 1e-12, "warmup_steps": 0, "weight_decay": 0.0}, "checkpoint": {"every": 1}}
    batch = {"global_batch": 16}
    train(validate(_run(run, scenes, source, train={"steps": 1, **batch}, **rates)))
    assert f"tensors of vit_nano from {source}" in caplog.text
    trained, begin = load_encoder(run)[0], load_encoder(run, weights="first")[0]
    assert equal(dict(begin.backbone.state_dict()), weights)
    for name, tensor in trained.backbone.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)
    shards = str(scenes)
    assert _rows(run, shards) == ["trained", "init_from", "raw pixels"]
    source.unlink()
    assert _rows(run, shards) == ["trained", "raw pixels"]
    assert "no row for the weights that the run began with" in caplog.text
    train(validate(_run(run, scenes, source, train={"steps": 2, **batch}, **rates)))
    assert f"model.init_from is not used: the run goes on from {run / 'checkpoints/step_00000001'}" in caplog.text
    assert (run / "checkpoints/step_00000002").is_dir()
