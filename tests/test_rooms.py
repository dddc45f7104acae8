"""Who may import whom, and how long a file may be: the rooms of docs/DESIGN.md, read off the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINERS = ROOT / "trainers"
SHARED = {"base", "features", "modules", "clip"}  # rooms that know no method
PLAIN = {"compat", "configs", "files", "log", "portable"}  # files beside them that know none either
# A method may know no other method. This one does: it is a variant of the other, and shares its learner.
KIN = {("jclip_adapter", "clip_adapter")}
# The room -> the rooms that it may know beside itself.
MAY_KNOW = {
    "clip": {"files", "log"},
    "modules": {"clip"},
    "features": {"clip", "modules", "files", "log", "compat"},
    "base": {"clip", "modules", "features", "portable", "configs", "log"},
    "compat": set(),
    "portable": {"compat"},
    "configs": {"compat"},
    "files": set(),
    "log": set(),
}
LONGEST = 400  # lines


def sources(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path):
    """trainers/coop.py -> coop; trainers/imo/dino.py -> imo."""
    first = path.relative_to(TRAINERS).parts[0]
    return first.removesuffix(".py")


def imports_of(path, package_root):
    """The dotted names of all modules that a file imports, relative ones resolved; packages as `a.b`."""
    here = path.relative_to(package_root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield module
            for alias in node.names:
                yield f"{module}.{alias.name}"


def known_rooms(path):
    """The rooms of trainers that a file knows, without its own."""
    found = set()
    for name in imports_of(path, ROOT):
        parts = name.split(".")
        if parts[0] == "trainers" and len(parts) > 1:
            room = TRAINERS / parts[1]
            if room.is_dir() or room.with_suffix(".py").exists():
                found.add(parts[1])
    return found - {room_of(path)}


METHODS = sorted(
    {room_of(path) for path in sources(TRAINERS)} - SHARED - PLAIN - {"__init__", "api", "app", "__main__"}
)


@pytest.mark.parametrize("path", sources(TRAINERS), ids=lambda path: path.relative_to(TRAINERS).as_posix())
def test_rooms_of_trainers_know_only_those_they_may(path):
    room = room_of(path)
    if room not in MAY_KNOW and room not in METHODS:
        return  # the package itself and its command line know everything
    allowed = MAY_KNOW.get(room, SHARED | PLAIN | {other for one, other in KIN if one == room})
    assert known_rooms(path) <= allowed, f"{room} may know {sorted(allowed)}"


def test_the_methods_are_found():
    assert {"dlrclip", "coop", "tip_adapter", "imo"} <= set(METHODS)
    assert all({one, other} <= set(METHODS) for one, other in KIN)


@pytest.mark.parametrize("path", sources(ROOT / "dassl"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_toolbox_knows_nothing_of_ours(path):
    assert not {name.split(".")[0] for name in imports_of(path, ROOT)} & {"trainers", "datasets", "scripts", "dlr_clip"}


@pytest.mark.parametrize("path", sources(ROOT / "datasets"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_datasets_know_only_the_toolbox(path):
    assert not {name.split(".")[0] for name in imports_of(path, ROOT)} & {"trainers", "scripts", "dlr_clip"}


def test_no_shared_room_names_a_method_s_keys():
    nodes = {"DLRCLIP", "COOP", "COCOOP", "MMADAPTER", "CLIPLORA", "TASKRES", "CLAP", "LINEARPROBE", "TIPADAPTER"}
    for room in SHARED:
        for path in sources(TRAINERS / room):
            named = {
                node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute)
            }  # fmt: skip
            assert not named & nodes, path


@pytest.mark.parametrize("folder", ["dassl", "datasets", "trainers", "scripts", "benchmarks"])
def test_no_file_is_too_long_to_read(folder):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(ROOT / folder)}
    assert {path.relative_to(ROOT).as_posix(): n for path, n in lengths.items() if n > LONGEST} == {}


def test_commands_are_thin():
    for name in ("train.py", "predict.py"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 80, name
