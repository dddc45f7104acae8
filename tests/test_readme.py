"""README.md: short, its tables made of the registries, its links and commands there, its Python snippet running."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from color_photos import COLORS, draw

from dassl.engine import TRAINER_REGISTRY
from scripts.dev.docs_tables import filled
from trainers.app.automatic import AUTO
from trainers.configs import find_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_at_most_400_words_beside_the_tables():
    """Tables grow with the registries: a new method must not drive out what people read first."""
    prose = re.sub(r"<!-- table: .*?<!-- end -->", "", TEXT, flags=re.DOTALL)
    assert len([word for word in prose.split() if re.search(r"[A-Za-z]", word)]) <= 400


def test_the_number_of_methods_is_that_of_the_registry():
    assert f"with {len(TRAINER_REGISTRY.registered_names())} methods under one protocol" in TEXT


@pytest.mark.parametrize("name", ["README.md", "docs/METHODS.md", "docs/EXPORT.md"])
def test_tables_follow_the_registries(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert filled(text) == text, "run: python scripts/dev/docs_tables.py"


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target


def test_commands_name_what_there_is():
    for line in re.findall(r"^(?:.*&& )?(python \S+\.py .*)$", TEXT, re.MULTILINE):
        words = shlex.split(line)
        assert (ROOT / words[1]).exists(), words[1]
        options = dict(zip(words, words[1:], strict=False))
        trainer = options.get("--trainer", "")
        assert trainer in ("", AUTO, *TRAINER_REGISTRY.registered_names())
        if "--config" in options:
            find_config(trainer, options["--config"])
        if "--config-file" in options:
            assert (ROOT / options["--config-file"]).exists()


HEADINGS = [
    "What it does",
    "What it learns",
    "Settings",
    "What is chosen, and on what",
    "What differs from the source",
]


@pytest.mark.parametrize("name", TRAINER_REGISTRY.registered_names())
def test_each_method_is_described_under_the_same_headings(name):
    text = (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    assert re.findall(r"^### (.*)$", section[1], re.MULTILINE) == HEADINGS
    assert f"<!-- table: keys {name} -->" in section[1]


def test_ci_runs_the_test_command():
    command = next(line for line in TEXT.splitlines() if "pytest" in line and "pip install" in line)
    assert command.rpartition("&& ")[2] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def run_snippet(document, folder):
    """Run the first Python snippet of a document in a folder, and return the lines that it prints."""
    snippet = re.search(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    assert snippet is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", snippet[1]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_snippet_runs(tmp_path):
    paths, _ = draw(tmp_path / "my_photos", dict.fromkeys(COLORS, 5))
    Path(paths[0]).rename(tmp_path / "new_photo.jpg")
    lines = run_snippet("README.md", tmp_path)
    assert any("expected accuracy" in line for line in lines) and lines[-1] == "['red']"
    assert (tmp_path / "my_photos.safetensors").exists()


def test_the_snippet_of_the_usage_page_runs(tmp_path):
    assert "'probe'" in run_snippet("docs/USAGE.md", tmp_path)[-1]
    assert (tmp_path / "output" / "from_python" / "metrics.json").exists()
