"""Durations in words and what becomes of them, against numbers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import small_config

from lejepa_scale.config import Config, dump, in_steps, load_config, recorded, validate
from lejepa_scale.config.durations import KEYS, length_of, steps_of, told
from lejepa_scale.config.keys import keys_of
from lejepa_scale.errors import UserError

IMAGENET = 1_281_167


def config(train: dict[str, Any], **sections: dict[str, Any]) -> Config:
    tree = small_config("r", "s", **sections)
    tree["train"] = {"global_batch": 128, **train}
    tree.setdefault("log", {"every": 10})
    return validate(tree)


@pytest.mark.parametrize(
    ("train", "samples", "steps"),
    [
        ({"epochs": 100}, 10_000, 7812),  # 7,812.5
        ({"epochs": 1}, 10_000, 78),  # 78.125
        ({"epochs": 0.5}, 10_000, 39),  # 39.06
        ({"epochs": 1.28}, 10_000, 100),  # 100 exactly, which floating point has as 100.0
        ({"epochs": 0.29, "global_batch": 1}, 100, 29),  # 0.29 x 100 is 28.999999999999996 in floating point
        ({"epochs": 1.1, "global_batch": 10}, 100, 11),  # 1.1 x 100 is 110.00000000000001
        ({"epochs": 100, "global_batch": 512}, IMAGENET, 250_227),  # 250,227.93
        ({"epochs": 800, "global_batch": 256}, 9469, 29_590),  # Imagenette; 29,590.6
        ({"epochs": 3}, 100, 2),  # an epoch is less than a batch: 2.34
        ({"images": 1_000_000}, 10_000, 7812),
        ({"images": 128}, 5, 1),
        ({"images": 255}, 10**9, 1),
        ({"steps": 17}, 10_000, 17),
    ],
)
def test_the_length_in_whole_steps(train: dict[str, Any], samples: int, steps: int) -> None:
    assert in_steps(config(train), samples).train.steps == steps


WORDS = {
    "optim.warmup_steps": ("5 epochs", 390),  # 390.6
    "optim.cooldown_steps": ("10%", 781),  # 781.2
    "average.every": ("1.28k images", 10),
    "log.every": ("0.1 epochs", 7),  # 7.8
    "evaluation.every": ("3 epochs", 234),
    "checkpoint.every": ("1 epoch", 78),
    "checkpoint.keep_every": ("10 epochs", 780),  # 781.25 rounds to 781, on which nothing is saved
}


def test_every_duration_takes_words() -> None:
    assert WORDS.keys() == set(KEYS)
    sections: dict[str, dict[str, Any]] = {
        "average": {"kind": "swa"}, "optim": {"schedule": "wsd"}, "evaluation": {"test": ["h"]},
    }  # fmt: skip
    for key, (words, _) in WORDS.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = words
    given = config({"epochs": 100}, **sections)
    expected = {"train.steps": 7812, **{key: steps for key, (_, steps) in WORDS.items()}}
    assert steps_of(in_steps(given, 10_000)) == expected
    said = told(given, 10_000)
    assert said.startswith(
        "100 epochs = 7,812 steps of 128 (1,000,000 images); optim.warmup_steps 5 epochs = 390 steps;"
    )
    assert said.endswith("an epoch is 10,000 images.")
    again = validate(yaml.safe_load(dump(given)))  # the words are what is recorded
    assert again == given == recorded(dump(given), "config.yaml")
    assert in_steps(in_steps(given, 10_000), 10_000) == in_steps(given, 10_000)


def test_keys_that_count_steps_are_durations() -> None:
    found = {key.path for key in keys_of(Config) if key.path.endswith((".every", ".keep_every", "_steps"))}
    assert found == set(KEYS)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("1.28M images", 10_000), ("1.28e6 images", 10_000), ("1B images", 7_812_500), ("1k images", 7), ("12.5%", 125),
        ("50 %", 500), ("100%", 1000), ("0.1%", 1), ("250 steps", 250), ("2k steps", 2000), ("300", 300), (300, 300),
        ("2 epochs", 156), ("0.5epochs", 39), (0, 0), ("0 steps", None), ("1 step", 1), ("128 image", 1),
    ],
)  # fmt: skip
def test_words_in_steps(words: str | int, steps: int | None) -> None:
    """Of a run of 1,000 steps over 10,000 images in batches of 128."""
    if steps is None:
        with pytest.raises(UserError, match="must be more than 0"):
            config({"steps": 1000}, optim={"warmup_steps": words})
    else:
        found = in_steps(config({"steps": 1000}, optim={"warmup_steps": words}), 10_000)
        assert (found.optim.warmup_steps, found.train.steps) == (steps, 1000)


def test_per_cent_are_of_the_whole_steps_of_the_run() -> None:
    """3.9 steps are 3, and 90 % of these 2.7."""
    found = in_steps(config({"epochs": 1}, optim={"warmup_steps": "90%"}), 500)
    assert (found.train.steps, found.optim.warmup_steps) == (3, 2)


def test_plain_steps_are_as_they_were() -> None:
    given = config({"steps": 17}, optim={"warmup_steps": 3}, checkpoint={"every": 7, "keep_every": 5})
    assert in_steps(given, 10_000) is given
    assert told(given, 10_000) == ""
    old = yaml.safe_load(dump(given))
    del old["train"]["epochs"], old["train"]["images"]  # as runs wrote it before
    assert recorded(yaml.safe_dump(old), "config.yaml") == given


@pytest.mark.parametrize(
    ("every", "evaluation", "kept", "expected"),
    [
        ("1 epoch", "2 epochs", "6 epochs", (78, 156, 468)),  # 78.9, 157.8, 473.4
        ("2 epochs", "1 epoch", "3 epochs", (156, 78, 156)),  # what is kept is one of those saved
        ("4 epochs", "3 epochs", None, (315, 236, None)),  # no multiple: each by itself
        ("3 epochs", "2 epochs", "6 epochs", (236, 157, 472)),  # of the longest that divides it
        ("10.1k images", "20.2k images", "10%", (78, 156, 78)),
        (100, "1 epoch", "10 epochs", (100, 78, 700)),  # 789
        (100, 30, "1 epoch", (100, 30, 100)),
    ],
)
def test_periods_meet(every: Any, evaluation: Any, kept: Any, expected: tuple[int | None, ...]) -> None:
    """Of 1,000 steps; an epoch is 78.9 steps (10,100 images of 128)."""
    given = config(
        {"steps": 1000},
        checkpoint={"every": every, "keep_every": kept},
        evaluation={"every": evaluation, "test": ["h"]},
    )
    found = in_steps(given, 10_100)
    assert (found.checkpoint.every, found.evaluation.every, found.checkpoint.keep_every) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=5", "train.epochs=3"], r"train\.steps = 5 and train\.epochs = 3\.0 .* Keep one"),
        (["train.epochs=3", "train.images=9"], "all say how long"),
        (["train.steps=null"], r"Give train\.steps, train\.epochs or train\.images"),
        (["train.epochs=0"], r"train\.epochs.*greater than 0"),
        (["train.epochs=-1"], r"train\.epochs.*greater than 0"),
        (["train.images=0"], r"train\.images.*greater than 0"),
        (["train.steps=0"], r"train\.steps.*greater than 0"),
        (["train.steps=100 epochs"], r"have a key of their own: train\.epochs=100"),
        (["train.steps=10%"], r"no number of steps"),
        (["train.steps=2.5"], r"train\.steps"),
        (
            ["optim.warmup_steps=5 epocs"],
            r"optim\.warmup_steps: '5 epocs' has no unit that is known, did you mean epochs\? Give an int.* run\)\.$",
        ),
        (["optim.warmup_steps=5 parsecs"], "no unit that is known: an int of steps, or words as in `5 epochs`"),
        (["optim.warmup_steps=0.1"], r"0\.1 is no whole number of steps.*`10%`"),
        (["optim.warmup_steps=-1"], r"optim\.warmup_steps.*greater than or equal to 0"),
        (["optim.warmup_steps=-1 epochs"], r"is no duration"),
        (["optim.warmup_steps=1.5 steps"], r"no whole number of steps"),
        (["optim.warmup_steps=soon"], r"'soon' is no duration"),
        (["optim.warmup_steps=0 epochs"], r"must be more than 0"),
        (["checkpoint.every=101%"], r"more than 0 and at most 100 %"),
        (["checkpoint.every=0"], r"checkpoint\.every.*greater than 0"),
    ],
)
def test_what_is_no_duration_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(small_config("r", "s")))
    with pytest.raises(UserError, match=message):
        load_config(path, overrides)


@pytest.mark.parametrize(
    ("train", "sections", "message"),
    [
        ({"epochs": 0.01}, {}, r"train\.epochs = 0\.01 is less than a step: 0\.781 of a batch .* 128.* 10,000 images"),
        ({"images": 127}, {}, r"train\.images = 127 is less than a step: 0\.992 of a batch"),
        (
            {"epochs": 1},
            {"optim": {"schedule": "wsd", "warmup_steps": "0.5 epochs", "cooldown_steps": 60}},
            r"with 1 epoch as 78 steps: .*warmup_steps = 39 and optim\.cooldown_steps = 60 are more than train\.steps = 78",
        ),
    ],
)
def test_what_comes_to_nothing_is_refused_once_the_data_is_known(
    train: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        in_steps(config(train, **sections), 10_000)


def test_a_trial_of_a_few_steps_warms_up_for_none_and_does_all_else_at_each() -> None:
    """`train.steps=9` over a recipe whose durations are shares or epochs of a long run."""
    few = config(
        {"steps": 9},
        optim={"warmup_steps": "5%", "schedule": "wsd", "cooldown_steps": "10%"},
        checkpoint={"every": "10%", "keep_every": "50%"},
        log={"every": "100 images"},
    )
    found = in_steps(few, 10_000)
    assert (found.optim.warmup_steps, found.optim.cooldown_steps) == (0, 1)
    assert (found.checkpoint.every, found.checkpoint.keep_every, found.log.every) == (1, 4, 1)
    assert "optim.warmup_steps 5% = 0 steps" in told(few, 10_000)


def test_an_override_takes_the_place_of_what_the_file_says_in_another_unit(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    tree = small_config("r", "s")
    tree["train"] = {"global_batch": 16, "epochs": 100}
    path.write_text(yaml.safe_dump(tree))
    assert length_of(load_config(path)) == ("train.epochs", "100 epochs")
    assert length_of(load_config(path, ["train.steps=20"])) == ("train.steps", "20 steps")
    assert length_of(load_config(path, ["train.epochs=0.5"])) == ("train.epochs", "0.5 epochs")
    assert length_of(load_config(path, ["train.images=2000"])) == ("train.images", "2,000 images")
    tree["train"]["steps"] = 3
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="all say how long the run is"):
        load_config(path)
    assert length_of(load_config(path, ["train.steps=null"])) == ("train.epochs", "100 epochs")  # as the error advises
