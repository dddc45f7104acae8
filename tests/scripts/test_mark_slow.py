"""Which tests the fast tier leaves out."""

from __future__ import annotations

import shutil
import subprocess
import sys

from scripts.dev.mark_slow import ROOT, SLOW_TESTS, durations, longest, slow_ones

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[x]" time="3.0"/>
<testcase classname="tests.test_a" name="test_one[y]" time="4.0"/>
<testcase classname="tests.test_b.TestIt" name="test_two" time="5.0"/>
<testcase classname="tests.test_b" name="test_three" time="9.5">
<properties><property name="fixture tests.test_b::runs" value="9.0"/></properties></testcase>
</testsuite></testsuites>"""


def test_the_slowest_go_until_the_rest_is_in_the_budget(tmp_path):
    (tmp_path / "r.xml").write_text(REPORT)
    found = durations(tmp_path / "r.xml")
    assert found == {
        "tests.test_a::test_one": 7.0,
        "tests.test_b.TestIt::test_two": 5.0,
        "tests.test_b::runs": 9.0,
        "tests.test_b::test_three": 0.5,
    }
    assert slow_ones(found, 22) == [] and slow_ones(found, 13) == ["tests.test_b::runs"]
    assert slow_ones(found, 6) == ["tests.test_a::test_one", "tests.test_b::runs"]
    assert slow_ones(found, 0.6) == ["tests.test_a::test_one", "tests.test_b.TestIt::test_two", "tests.test_b::runs"]


def test_of_several_reports_the_longest_time_counts(tmp_path):
    (tmp_path / "whole.xml").write_text(REPORT)
    fast = '<testcase classname="tests.test_b" name="test_three" time="2.0"/>'
    (tmp_path / "fast.xml").write_text(f"<testsuites><testsuite>{fast}</testsuite></testsuites>")
    for order in (("whole", "fast"), ("fast", "whole")):
        found = longest([tmp_path / f"{name}.xml" for name in order])
        assert found["tests.test_b::test_three"] == 2.0 and found["tests.test_b::runs"] == 9.0


INNER = """
import pytest

@pytest.fixture(scope="module")
def dear():
    return 1

def test_uses(dear):
    pass

def test_free():
    pass
"""


def test_tests_that_use_a_slow_fixture_are_slow_and_the_report_notes_its_time(tmp_path):
    """A real pytest with this project's conftest.py, and a list that names the fixture alone."""
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    (tests / "test_it.py").write_text(INNER)
    (tests / "slow_tests.txt").write_text("tests.test_it::dear\n")
    helpers = ROOT / "tests" / "helpers"  # conftest.py imports one
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers = slow: slow\npythonpath = {helpers}\n")

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), *arguments, str(tests)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    assert "1 passed, 1 deselected" in run("-m", "not slow")
    assert "2 passed" in run("--junitxml", str(tmp_path / "r.xml"))
    assert set(durations(tmp_path / "r.xml")) == {
        "tests.test_it::dear", "tests.test_it::test_uses", "tests.test_it::test_free",
    }  # fmt: skip


def test_every_name_in_the_list_is_a_test_that_there_is():
    """A test or fixture that was renamed would be fast again, unnoticed."""
    for line in SLOW_TESTS.read_text(encoding="utf-8").split():
        module, _, function = line.partition("::")
        parts = module.split(".")
        files = [ROOT.joinpath(*parts[:count]).with_suffix(".py") for count in (len(parts), len(parts) - 1)]
        path = next((path for path in files if path.is_file()), None)
        assert path is not None and f"def {function}(" in path.read_text(encoding="utf-8"), line


def test_the_marker_is_known(pytestconfig):
    assert any(line.startswith("slow:") for line in pytestconfig.getini("markers"))
