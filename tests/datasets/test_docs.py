"""docs/DATASETS.md, to which messages about missing files point, against the readers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import datasets
from dassl.data.datasets import DATASET_REGISTRY
from scripts.lib.dataset_sources import SOURCES
from trainers.clip import templates_for

CHECKOUT = Path(datasets.__file__).parent.parent
TEXT = (CHECKOUT / "docs" / "DATASETS.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part.replace("\n", " ") for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}


@pytest.mark.parametrize("name", DATASET_REGISTRY.registered_names())
def test_every_dataset_has_a_section_with_its_prompt(name):
    assert f"`{templates_for(name)[0]}`" in SECTIONS[name]


@pytest.mark.parametrize("name", SOURCES)
def test_section_names_folder_files_counts_and_page(name):
    reader, source = DATASET_REGISTRY.get(name), SOURCES[name]
    section = SECTIONS[name]
    assert f"    {reader.folder}/ " in section
    for path in (part for part in source.parts for part in part.gives):
        assert path.rpartition("/")[2] in section, path
    for count in filter(None, source.counts):
        assert f"{count:,}" in section
    assert f"<{source.page}>" in section
    config = next(
        file.name for file in (CHECKOUT / "configs" / "datasets").glob("*.yaml") if f'"{name}"' in file.read_text()
    )
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| [{name}]"))
    assert f"`{config}` | `{reader.folder}` | {source.counts[0]:,} |" in row
