"""Where lines go: console and log.txt, from print and from logging."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from dassl.utils import Logger, close_logger, setup_logger
from dassl.utils.logger import ALL_LINES, DETAIL, MAIN_LINES, QUIET, RESULT, is_quiet, warnings_so_far
from trainers.log import DETAIL as OF_TRAINERS


@pytest.fixture(autouse=True)
def console(capsys):
    yield capsys
    close_logger()


def test_print_and_logging_reach_both_once_and_in_order(tmp_path, console):
    path = setup_logger(tmp_path)
    print("one")
    logging.getLogger("some.module").info("two %d", 2)
    print("three", flush=True)
    logging.getLogger("some.module").debug("hidden")
    expected = "one\ntwo 2\nthree\n"
    assert path == tmp_path / "log.txt"
    assert path.read_text() == expected  # without closing: a killed run keeps its lines
    assert console.readouterr().out == expected


@pytest.mark.parametrize(
    "shown, expected",
    [
        (QUIET, ["result", "warning"]),
        (MAIN_LINES, ["plain", "result", "warning"]),
        (ALL_LINES, ["plain", "detail", "detail of a trainer", "result", "warning"]),
    ],
)
def test_the_console_shows_what_was_asked_for_and_the_file_everything(shown, expected, tmp_path, console):
    assert not is_quiet() and warnings_so_far() == []
    path = setup_logger(tmp_path, shown=shown)
    log = logging.getLogger("some.module")
    log.info("plain")
    log.info("detail", extra=DETAIL)
    log.info("detail of a trainer", extra=OF_TRAINERS)
    log.info("result", extra=RESULT)
    log.warning("warning")
    assert console.readouterr().out.splitlines() == expected
    assert path.read_text().splitlines() == ["plain", "detail", "detail of a trainer", "result", "warning"]
    log.warning("%s again", "warning")
    log.warning("warning")
    assert warnings_so_far() == ["warning", "warning again"] and is_quiet() == (shown == QUIET)
    close_logger()
    assert not is_quiet() and warnings_so_far() == []


def test_close_puts_everything_back(tmp_path, console):
    root = logging.getLogger()
    stdout, before = sys.stdout, (list(root.handlers), root.level)
    setup_logger(tmp_path)
    close_logger()
    close_logger()
    assert (root.handlers, root.level) == before
    assert sys.stdout is stdout
    print("after")
    assert (tmp_path / "log.txt").read_text() == ""


def test_setting_up_again_replaces(tmp_path, console):
    setup_logger(tmp_path / "a")
    setup_logger(tmp_path / "b")
    print("x")
    logging.getLogger("m").info("y")
    assert (tmp_path / "a" / "log.txt").read_text() == ""
    assert (tmp_path / "b" / "log.txt").read_text() == "x\ny\n"
    assert console.readouterr().out == "x\ny\n"


def test_an_older_log_stays(tmp_path):
    first, second, third = (setup_logger(tmp_path) for _ in range(3))
    assert first.name == "log.txt"
    assert re.fullmatch(r"log\.txt-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", second.name)
    assert len({first, second, third}) == 3
    print("x")
    assert third.read_text() == "x\n" and first.read_text() == ""


def test_a_file_name_and_no_name(tmp_path, console):
    stdout = sys.stdout
    assert setup_logger(str(tmp_path / "sub" / "run.log")) == tmp_path / "sub" / "run.log"
    assert setup_logger() is None
    assert sys.stdout is stdout
    logging.getLogger("m").info("y")
    assert console.readouterr().out == "y\n"


def test_a_stream_put_over_ours_is_left_alone(tmp_path):
    setup_logger(tmp_path)
    tee, other = sys.stdout, io.StringIO()
    sys.stdout = other
    logging.getLogger("m").info("y")
    close_logger()
    left, sys.stdout = sys.stdout, tee.console
    assert left is other
    assert (tmp_path / "log.txt").read_text() == "y\n"


def test_library_chatter_on_the_root_logger_is_dropped(tmp_path):
    path = setup_logger(tmp_path)
    root = logging.getLogger()
    record = root.makeRecord("root", logging.INFO, "/x/site-packages/lib/a.py", 1, "chatter", (), None)
    root.handle(record)
    root.handle(root.makeRecord("root", logging.WARNING, "/x/site-packages/lib/a.py", 1, "warning", (), None))
    root.handle(root.makeRecord("root", logging.INFO, "/home/me/train.py", 1, "mine", (), None))
    assert path.read_text() == "warning\nmine\n"


def test_logger_is_a_stream(tmp_path, console):
    with Logger(tmp_path / "new" / "a.txt") as stream:
        assert stream.write("x\n") == 2
        assert stream.isatty() is False
        stream.flush()
    Logger().write("y")
    assert (tmp_path / "new" / "a.txt").read_text() == "x\n"
    assert console.readouterr().out == "x\ny"
