"""Write the tables of README.md and of documents that follow from the registries.

    python scripts/dev/docs_tables.py            write them
    python scripts/dev/docs_tables.py --check    change nothing; exit code 1 where one is out of date

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`. Names: `methods`, `datasets`, `exports`, and
`keys TRAINER`, the settings of a trainer.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY
from dassl.utils.cli import run_main
from trainers.api.export.forms import FORMATS, formats_of, why_not
from trainers.base.keys import describe_keys
from trainers.configs import configs_of

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "METHODS.md", ROOT / "docs" / "EXPORT.md")
_TABLE = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
# What a dataset is -> whether a registered class is of that kind, the first that fits.
_KINDS = {
    "your own images": lambda name, cls: name in ("ImageFolder", "OpenImages"),
    "made on your machine": lambda name, cls: name.startswith(("Digits", "Shapes")),
    "shifted test sets of ImageNet": lambda name, cls: cls.test_only,
    "few-shot benchmarks": lambda name, cls: True,
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def methods_table() -> str:
    """Return the table of all methods: name, paper, what it learns, whether it serves new classes, configs' folder."""
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    trainers.extend_cfg(cfg)
    rows = []
    for name in TRAINER_REGISTRY.registered_names():
        method: Any = TRAINER_REGISTRY.get(name)
        folders = sorted({file.parent.name for file in configs_of(name).values()})
        new = "no" if method.each_class_has(cfg) else "yes"
        rows.append([f"`{name}`", method.paper, method.learns, new, f"`{', '.join(folders)}`"])
    rows.sort(key=lambda row: (row[0] != "`DLRCLIP`", row[0].strip("`").lower()))
    return markdown(["method", "paper", "what it learns", "new classes", "configs/trainers/"], rows)


def datasets_table() -> str:
    """Return the table of all datasets, by kind."""
    found: dict[str, list[str]] = {kind: [] for kind in reversed(_KINDS)}
    for name in DATASET_REGISTRY.registered_names():
        cls = DATASET_REGISTRY.get(name)
        found[next(kind for kind, fits in _KINDS.items() if fits(name, cls))].append(name)
    return markdown(["datasets", ""], [[kind, ", ".join(names)] for kind, names in found.items()])


def exports_table() -> str:
    """Return the table of the formats that methods can be exported to; those with the same formats share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in TRAINER_REGISTRY.registered_names():
        method = TRAINER_REGISTRY.get(name)
        marks = tuple("yes" if format in formats_of(method) else "no" for format in FORMATS)
        reasons = dict.fromkeys(why_not(method, format) for format in FORMATS if why_not(method, format))
        rows.setdefault((*marks, "; ".join(reasons)), []).append(f"`{name}`")
    cells = [[", ".join(names), *row] for row, names in sorted(rows.items(), reverse=True)]
    return markdown(["methods", *FORMATS, "why not"], cells)


def keys_table(name: str) -> str:
    """Return the table of a trainer's settings.

    Args:
        name: of a registered trainer.
    """
    method: Any = TRAINER_REGISTRY.get(name)
    rows = describe_keys(method.config)
    for section, keys in method.extra_keys.items():
        rows += describe_keys(keys, f"{section}.")
    cells = [[f"`{key}`", f"`{default}`", allowed, about, source] for key, default, allowed, about, source in rows]
    return markdown([f"`TRAINER.{method.node_name}.`", "default", "range", "what it is", "source"], cells)


def table(name: str) -> str:
    """Return the table of a name, as documents call it.

    Raises:
        KeyError: there is no such table.
    """
    if name == "methods":
        return methods_table()
    if name == "datasets":
        return datasets_table()
    if name == "exports":
        return exports_table()
    kind, _, trainer = name.partition(" ")
    if kind != "keys":
        raise KeyError(
            f"Expected the name of a table to be methods, datasets, exports or keys TRAINER but got {name!r}"
        )
    return keys_table(trainer)


def filled(text: str) -> str:
    """Return a document with its tables made anew."""
    return _TABLE.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, and say whether something would")
    args = parser.parse_args(arguments)
    stale = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'out of date' if args.check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
