from pathlib import Path

import pytest

from dassl.utils import InputError
from datasets.cache import build_once, cache_root


def test_cache_root_prefers_own_variable_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("DLR_CLIP_CACHE")
    assert cache_root() == tmp_path / "xdg" / "dlr_clip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / ".cache" / "dlr_clip"


def test_build_once_fills_a_folder_one_time(tmp_path):
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("x")

    for _ in range(2):
        assert build_once(tmp_path / "a" / "b", fill) == tmp_path / "a" / "b"
    assert len(calls) == 1
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_build_once_leaves_nothing_when_filling_fails(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        build_once(tmp_path / "b", fill)
    assert list(tmp_path.iterdir()) == []


def test_build_once_uses_the_folder_of_a_faster_process(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "file").write_text("mine")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "file").write_text("theirs")

    build_once(tmp_path / "b", fill)
    assert (tmp_path / "b" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_unwritable_place_is_named_with_the_ways_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"(?s)file.b.*--root.*DLR_CLIP_CACHE"):
        build_once(tmp_path / "file" / "b", lambda folder: None)
