"""What exists for an upstream Dassl, without one; tests/test_upstream.py runs trainers on a real one."""

from __future__ import annotations

import logging

import pytest

from dassl.engine import TrainerX
from trainers.compat import be_heard, is_ours


class Upstream:
    """As upstream's trainers: without precision."""


@pytest.fixture
def package():
    log = logging.getLogger("a_package_of_ours")
    yield log.name
    log.handlers.clear()
    logging.disable(logging.NOTSET)


def test_lines_are_heard_where_logging_is_switched_off(package, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logging.disable(logging.WARNING)  # as one of upstream's datasets does when it is imported
    for _ in range(2):
        be_heard(Upstream, package)
    logging.getLogger(f"{package}.module").info("accuracy %d%%", 50)
    assert capsys.readouterr().out == "accuracy 50%\n"
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])  # somebody has set logging up
    logging.getLogger(f"{package}.module").info("accuracy")
    assert capsys.readouterr() == ("", "")


def test_our_own_toolbox_sees_to_the_console_itself(package):
    assert is_ours(TrainerX) and not is_ours(Upstream)
    be_heard(TrainerX, package)
    assert logging.getLogger(package).handlers == []
