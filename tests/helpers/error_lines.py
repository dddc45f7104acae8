"""Look at what a command says on stderr."""

from __future__ import annotations


def assert_one_line(stderr: str, *words: str) -> None:
    """An error is told in one line, which has these words, and without a traceback."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    for word in words:
        assert word in lines[0], lines[0]
