"""Choose the tests that the fast tier leaves out, from measured durations.

    pytest -n 2 --dist loadfile --junitxml report.xml
    python scripts/dev/mark_slow.py report.xml [--budget 14]

Writes `tests/slow_tests.txt`: the slowest test functions (all their parameters together), as many as it takes for the
others to need less than the budget, in seconds of one process. tests/conftest.py marks them "slow". The budget is small
because it is not all: processes start, and what slow tests set up for others has to be set up all the same.
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
    """Return seconds of each test function ("tests.dassl.test_lock::test_one"), set-up and parameters included."""
    found: defaultdict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        function = str(case.get("name")).partition("[")[0]
        found[f"{case.get('classname')}::{function}"] += float(case.get("time", 0))
    return dict(found)


def slow_ones(found: Mapping[str, float], budget: float) -> list[str]:
    """Return the fewest functions without which the others need less than `budget` seconds, sorted by name."""
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
    parser.add_argument("report", type=Path, help="JUnit XML of a whole run")
    parser.add_argument("--budget", type=float, default=14.0, help="seconds of one process (default: 14)")
    args = parser.parse_args(argv)
    try:
        found = durations(args.report)
        names = slow_ones(found, args.budget)
        SLOW_TESTS.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    except (*SETUP_ERRORS, ElementTree.ParseError) as error:
        return fail(error)
    rest = sum(seconds for name, seconds in found.items() if name not in set(names))
    print(f"{len(names)} of {len(found)} functions are slow; the others take {rest:.0f} s: {SLOW_TESTS}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
