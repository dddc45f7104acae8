"""The changes of scripts/dev/mutate.py fit the code, and it tells the noticed from the unnoticed."""

from __future__ import annotations

import pytest

from scripts.dev import mutate


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=[m.what for m in mutate.MUTATIONS])
def test_each_change_fits_one_line(mutation):
    text = mutate.mutated(mutation, mutate.ROOT)
    compile(text, mutation.file, "exec")
    assert all((mutate.ROOT / test).is_file() for test in mutation.tests)


def test_noticed_and_unnoticed(tmp_path):
    (tmp_path / "sum.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "test_sum.py").write_text("from sum import add\n\n\ndef test_add():\n    assert add(2, 2) == 4\n")
    wrong = mutate.Mutation("", "sum.py", "a + b", "a - b", ("test_sum.py",))
    assert mutate.run(wrong, tmp_path)[0] == "test_sum.py::test_add"
    assert mutate.run(wrong._replace(new="a * b"), tmp_path)[0] == ""
    assert (tmp_path / "sum.py").read_text().endswith("a + b\n")
    with pytest.raises(ValueError, match="'a / b' once but found it 0 times"):
        mutate.run(wrong._replace(old="a / b"), tmp_path)
