"""Choose the tests that the fast tier leaves out, from measured durations.

    pytest -n 2 --dist loadfile --junitxml report.xml
    python scripts/dev/mark_slow.py report.xml [more.xml ...] [--budget 14]

Writes `tests/slow_tests.txt`: the slowest test functions (all their parameters together) and fixtures of whole files,
as many as it takes for the others to need less than the budget, in seconds of one process. tests/conftest.py marks
them, and the tests that use such a fixture, "slow". The budget is small because it is not all: processes start, and
import torch. Of several reports the longest time of each counts; a report of the fast tier (`-m "not slow"`) shows what
slow tests had done for others before.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.utils.cli import SETUP_ERRORS, Parser, fail, run_main

ROOT = Path(__file__).resolve().parents[2]
SLOW_TESTS = ROOT / "tests" / "slow_tests.txt"


def durations(report: Path) -> dict[str, float]:
    """Return seconds of each test function and each fixture of a whole file ("tests.dassl.test_lock::test_one").

    A function's seconds are those of all its parameters. They include the set-up of its own fixtures, and not that of
    the file's, which are counted to whichever test comes first.
    """
    found: defaultdict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        function = str(case.get("name")).partition("[")[0]
        seconds = float(case.get("time", 0))
        for note in case.iter("property"):
            kind, _, fixture = str(note.get("name")).partition(" ")
            if kind == "fixture":
                taken = float(note.get("value", 0))
                found[fixture] += taken
                seconds -= taken
        found[f"{case.get('classname')}::{function}"] += max(seconds, 0.0)
    return dict(found)


def longest(reports: Sequence[Path]) -> dict[str, float]:
    """Return the longest time of each function and fixture in the reports."""
    found: dict[str, float] = {}
    for report in reports:
        for name, seconds in durations(report).items():
            found[name] = max(seconds, found.get(name, 0.0))
    return found


def slow_ones(found: Mapping[str, float], budget: float) -> list[str]:
    """Return the fewest functions and fixtures without which the others need less than `budget` seconds, sorted."""
    slowest = sorted(found, key=lambda name: found[name], reverse=True)
    left, chosen = sum(found.values()), []
    for name in slowest:
        if left < budget:
            break
        chosen.append(name)
        left -= found[name]
    return sorted(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="report", help="JUnit XML of a run")
    parser.add_argument("--budget", type=float, default=14.0, help="seconds of one process (default: 14)")
    args = parser.parse_args(argv)
    try:
        found = longest(args.reports)
        names = slow_ones(found, args.budget)
        SLOW_TESTS.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    except (*SETUP_ERRORS, ElementTree.ParseError) as error:
        return fail(error)
    rest = sum(seconds for name, seconds in found.items() if name not in set(names))
    print(f"{len(names)} of {len(found)} functions and fixtures are slow; the others take {rest:.0f} s: {SLOW_TESTS}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
