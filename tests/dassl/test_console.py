"""Streams as they are met: a console that is not UTF-8, and readers that go away; real processes and pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import logging, os, sys
from dassl.utils import setup_logger
from dassl.evaluation.passes import progress_bar
from dassl.utils.cli import run_main

def main():
    setup_logger(sys.argv[1])
    logging.getLogger("x").info("first")
    sys.stdin.readline()  # until the reader is gone
    for number in progress_bar(range(50), miniters=1):
        logging.getLogger("x").info("line %d", number)
        print("printed", number)
    return 0

sys.exit(run_main(main))
"""


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_run_outlives_its_reader(tmp_path, both):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "first\n"
    process.stdout.close()  # as "| head -1" does
    process.stdin.write("go on\n")
    process.stdin.close()
    process.stdin = None
    said = "" if both else process.stderr.read()
    assert process.wait(60) == 0
    log = (tmp_path / "log.txt").read_text()
    assert "line 49" in log and "printed 49" in log and "stdout cannot be written any more" in log
    assert "Traceback" not in said and said.count("stdout cannot be written any more") == (not both), said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_names_that_the_console_cannot_show_are_escaped(tmp_path, encoding):
    (tmp_path / "program.py").write_text(
        "import logging, sys\nfrom dassl.utils import setup_logger\nfrom dassl.utils.cli import run_main\n"
        "def main():\n    setup_logger(sys.argv[1])\n    logging.getLogger('x').info('\u732b caf\u00e9')\n"
        "    print('\u732b')\n    return 0\nsys.exit(run_main(main))\n",
        encoding="utf-8",
    )
    result = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert result.returncode == 0 and result.stderr == b""
    assert result.stdout.count(rb"\u732b") == 2
    assert "\u732b caf\u00e9" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_commands_end_quietly_when_their_reader_has_seen_enough():
    process = subprocess.Popen(
        [sys.executable, "scripts/compare.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0
