"""The rooms of scripts/: commands answer --help, what they share is in lib/, and nothing imports in a circle."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "scripts").rglob("*.py"))
COMMANDS = [path for path in FILES if '\nif __name__ == "__main__":\n' in path.read_text()]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules of scripts/ that a file imports, wherever in it."""
    names = {name_of(file) for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & names - {"scripts", "scripts.lib", "scripts.figures", "scripts.dev"}


def test_commands_are_in_their_rooms():
    rooms = {path: path.parent.relative_to(ROOT / "scripts").as_posix() for path in COMMANDS}
    assert set(rooms.values()) == {".", "figures", "dev"}
    beside = {path.name for path in FILES if path.parent == ROOT / "scripts"} - {path.name for path in COMMANDS}
    assert beside == {"__init__.py"}
    assert [path.stem for path, room in rooms.items() if room == "figures" and not path.stem.startswith("plot_")] == []


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_answers_help(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {path.name}")
    assert ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0][:60] in said


@pytest.mark.parametrize(
    "name", ["scripts/parse_results.py", "scripts/figures/plot_curves.py", "scripts/dev/mark_slow.py"]
)
def test_a_command_finds_the_checkout_from_another_folder(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / name), "--help"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_commands_share_knows_no_command():
    commands = {name_of(path) for path in COMMANDS}
    for path in FILES:
        if path.parent.name == "lib":
            assert not {name for name in imports(path) if not name.startswith("scripts.lib.")}, path
        assert path in COMMANDS or not imports(path) & commands, path
    inside = {path for path in FILES if path.parent.name != "dev"}  # what is installed
    assert not [path for path in inside if any(name.startswith("scripts.dev") for name in imports(path))]


def test_nothing_imports_in_a_circle():
    graph = {name_of(path): imports(path) - {name_of(path)} for path in FILES}
    while graph:
        free = {name for name, wanted in graph.items() if not wanted & graph.keys()}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {name: wanted for name, wanted in graph.items() if name not in free}
