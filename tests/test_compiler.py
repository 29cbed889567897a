"""Compiled kernels: whole, and from a folder that is the user's alone."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from shutil import which

import pytest

from lejepa_scale.cpu import compiler

pytestmark = pytest.mark.skipif(which("g++") is None and which("clang++") is None, reason="needs a C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "seven.cpp"
    path.write_text('extern "C" int seven() { return 3 + 2 * sizeof(REAL) / sizeof(REAL) * 2; }')
    return path


def seven(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).seven())


def test_a_library_is_built_once_into_a_private_folder(source: Path, tmp_path: Path) -> None:
    library = compiler.build(source, "float")
    assert library.parent == tmp_path / "cache/lejepa_scale/kernels"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    made = library.stat().st_mtime_ns
    assert compiler.build(source, "float") == library
    assert library.stat().st_mtime_ns == made
    assert seven(library) == 7


@pytest.mark.parametrize("damage", ["half", "another", "no digest"])
def test_a_library_that_is_not_whole_is_built_again(damage: str, source: Path) -> None:
    """A shortened one would end the process when it is loaded."""
    library = compiler.build(source, "float")
    data = library.read_bytes()
    if damage == "no digest":
        library.with_suffix(".digest").unlink()
    else:
        library.unlink()
        library.write_bytes(data[: len(data) // 2] if damage == "half" else data[:-1] + bytes([data[-1] ^ 1]))
    again = compiler.build(source, "float")
    assert again == library
    assert seven(again) == 7
    assert compiler.build(source, "float").stat().st_mtime_ns == again.stat().st_mtime_ns


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o500])
def test_a_folder_that_others_can_write_is_not_used(mode: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compiler.build(source, "float").parent
    folder.chmod(mode)
    if mode == 0o500:
        original = os.access  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, how: path != folder and original(path, how))
    elsewhere = compiler.build(source, "float")
    assert elsewhere.parent != folder
    assert elsewhere.parent.stat().st_mode & 0o777 == 0o700
    assert seven(elsewhere) == 7
    folder.chmod(0o700)


def test_a_folder_of_another_user_or_a_link_is_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compiler.build(source, "float").parent
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert compiler.build(source, "double").parent != folder
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert compiler.build(source, "float").parent != folder


def test_a_cache_that_cannot_be_made_is_no_obstacle(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert seven(compiler.build(source, "float")) == 7
