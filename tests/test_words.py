"""The first line of a docstring: one sentence, which says in the imperative what the function does."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dassl", "trainers", "datasets", "scripts", "dlr_clip_cli")
# Verbs that a first line may begin with; add to the file what fits.
VERBS = set((Path(__file__).parent / "assets" / "verbs.txt").read_text(encoding="utf-8").split())
HEADLESS = {"What", "Whether", "How", "Where", "Which", "Who", "Why", "When"}
# Python calls these by itself: what they do is known.
KNOWN = {"__init__", "__len__", "__iter__", "__getitem__", "__repr__", "__str__", "__enter__", "__exit__"}


def sources(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True).stdout.split()
    found = [ROOT / name for name in listed if name.endswith(".py")]
    return found or [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def first_lines(path):
    """(line number, first line) of the docstring of every function and method, properties left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name in KNOWN:
            continue
        kinds = {d.id if isinstance(d, ast.Name) else getattr(d, "attr", "") for d in node.decorator_list}
        text = ast.get_docstring(node)
        if text and not kinds & {"property", "cached_property", "setter"}:
            yield node.lineno, text.split("\n")[0]


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_first_lines_are_imperative_sentences(path):
    wrong = [
        f"{number}: {line}"
        for number, line in first_lines(path)
        if line.split()[0].rstrip(",;:.") not in VERBS or not line.rstrip().endswith((".", "!", "?", ":"))
    ]
    assert not wrong, "\n".join(wrong)


def documented(path):
    """(line number, first line) of the docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text.split("\n")[0]


@pytest.mark.parametrize("path", sources(*FOLDERS, "benchmarks"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_first_line_is_a_clause_without_its_sentence(path):
    """ "What one panel shows." names no subject, in a module, class or property as little as in a function."""
    wrong = [f"{number}: {line}" for number, line in documented(path) if line.split()[0] in HEADLESS]
    assert not wrong, "\n".join(wrong)
