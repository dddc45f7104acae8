"""The short form of scripts/dev/kill_test.py: each trainer's run is killed once, resumed, and compared bit by bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch

from scripts.dev.kill_test import CONFIGS, Outcome, Runs, check, command, paint


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kill") / "images"
    paint(root)
    return root


@pytest.mark.parametrize("trainer", CONFIGS)
def test_killed_run_ends_as_the_one_that_was_not(trainer, pictures, random_tiny, tmp_path):
    short = ("MODEL.BACKBONE.WEIGHTS", str(random_tiny), "OPTIM.MAX_EPOCH", "2")
    arguments, rng = command(trainer, pictures, *short), random.Random(trainer)
    ((_, _, found),) = check(Runs(), arguments, 1, rng, tmp_path, signal.SIGKILL)
    assert found == []


def test_differences_are_found():
    def outcome(value: float, bit: float) -> Outcome:
        return Outcome({"accuracy": value}, {"net": {"weight": torch.tensor([1.0, bit]), "list": [1, float("nan")]}})

    assert outcome(1.0, 0.0).differences(outcome(1.0, 0.0)) == []
    assert outcome(1.0, 0.0).differences(outcome(1.5, -0.0)) == ["metrics.json/accuracy", "checkpoint/net/weight"]
