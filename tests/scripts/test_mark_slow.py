"""Which tests the fast tier leaves out."""

from __future__ import annotations

from scripts.dev.mark_slow import ROOT, SLOW_TESTS, durations, slow_ones

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[x]" time="3.0"/>
<testcase classname="tests.test_a" name="test_one[y]" time="4.0"/>
<testcase classname="tests.test_b.TestIt" name="test_two" time="5.0"/>
<testcase classname="tests.test_b" name="test_three" time="0.5"/>
</testsuite></testsuites>"""


def test_the_slowest_go_until_the_rest_is_in_the_budget(tmp_path):
    (tmp_path / "r.xml").write_text(REPORT)
    found = durations(tmp_path / "r.xml")
    assert found == {
        "tests.test_a::test_one": 7.0,
        "tests.test_b.TestIt::test_two": 5.0,
        "tests.test_b::test_three": 0.5,
    }
    assert slow_ones(found, 13) == [] and slow_ones(found, 6) == ["tests.test_a::test_one"]
    assert slow_ones(found, 0.6) == ["tests.test_a::test_one", "tests.test_b.TestIt::test_two"]


def test_every_name_in_the_list_is_a_test_that_there_is():
    """A test that was renamed would be fast again, unnoticed."""
    for line in SLOW_TESTS.read_text(encoding="utf-8").split():
        module, _, function = line.partition("::")
        parts = module.split(".")
        files = [ROOT.joinpath(*parts[:count]).with_suffix(".py") for count in (len(parts), len(parts) - 1)]
        path = next((path for path in files if path.is_file()), None)
        assert path is not None and f"def {function}(" in path.read_text(encoding="utf-8"), line


def test_the_marker_is_known(pytestconfig):
    assert any(line.startswith("slow:") for line in pytestconfig.getini("markers"))
