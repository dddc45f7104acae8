"""examples/own_photos.ipynb runs as it stands, on photos that are made here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from color_photos import COLORS, draw

ROOT = Path(__file__).parents[1]


def test_the_notebook_runs(tmp_path, monkeypatch, tiny_weights):
    if tiny_weights:
        pytest.skip("the bundled CLIP is not there")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    draw(tmp_path / "my_photos", dict.fromkeys(COLORS, 5))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "examples" / "own_photos.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert "expected accuracy" in shown[0]["text/plain"] and "<table>" in shown[0]["text/html"]
    assert (tmp_path / "inspect.html").exists() and (tmp_path / "my_photos.safetensors").exists()
    assert not [output for output in outputs if output.get("name") == "stdout"]  # it is quiet
