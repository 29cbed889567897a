"""A recipe by its name, and a file that wins over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from lejepa_scale.config import load_config, paths
from lejepa_scale.errors import UserError


def test_every_recipe_of_the_checkout_is_found_by_name_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}
    assert paths.recipes() == files
    assert len(files) >= 7
    for name, path in files.items():
        assert load_config(Path(name)) == load_config(path)


def test_a_file_wins_over_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    Path("quickstart").mkdir()  # a folder of that name is no configuration
    assert load_config(Path("quickstart")).train.steps == tree["train"]["steps"]
    Path("quickstart").rmdir()
    tree["train"]["steps"] = 61
    Path("quickstart").write_text(yaml.safe_dump(tree))
    assert load_config(Path("quickstart")).train.steps == 61


def test_a_wheels_recipes_lie_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "lejepa_scale/recipes"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# Hardware: a potato\nrun: {}\n")
    monkeypatch.setattr(paths, "_PACKAGE", folder.parent)
    assert paths.recipes() == {"mine": folder / "mine.yaml"}
    assert paths.recipe_table().split() == ["mine", "a", "potato"]
    with pytest.raises(UserError, match="did you mean mine"):
        paths.find_config(Path("mien"))


def test_the_heads_of_all_recipes_say_the_hardware() -> None:
    rows = paths.recipe_table().splitlines()
    assert all(len(row.split(None, 1)) == 2 for row in rows), rows
