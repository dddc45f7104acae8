"""The methods in forty lines of examples/: each trains, learns, and leaves what every run leaves."""

import ast
import json
import os
from pathlib import Path

import pytest
from programs import run_program

ROOT = Path(__file__).parents[1]
EXAMPLES = {"class_shift": "ClassShift", "near_prompts": "NearPrompts"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_from_another_folder(name, tmp_path):
    command = [
        *(str(ROOT / "examples" / f"{name}.py"), "--trainer", EXAMPLES[name]),
        *("--config-file", str(ROOT / "examples" / f"{name}.yaml"), "--output-dir", "run"),
        *("DATASET.NUM_SHOTS", "2", "OPTIM.MAX_EPOCH", "3"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = run_program(command, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["trainer"] == EXAMPLES[name] and set(found["test"]["heads"]) == {"clip", EXAMPLES[name].lower()}
    assert found["params"]["trainable"] > 0 and (tmp_path / "run" / EXAMPLES[name].lower() / "checkpoint").exists()
    heads = found["test"]["heads"]
    assert heads["clip"] != heads[EXAMPLES[name].lower()]  # it has learnt something


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    docs = sum(
        (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    )
    lines = text.splitlines()
    code = sum(1 for c in classes for line in lines[c.lineno - 1 : c.end_lineno] if line.strip()) - docs
    assert code <= 40, code


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
