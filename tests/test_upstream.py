"""Our trainers on a real upstream Dassl: a checkout of KaiyangZhou/Dassl.pytorch, where UPSTREAM_DASSL names one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
UPSTREAM = os.environ.get("UPSTREAM_DASSL", "")
# Trainer -> the heads that a run reports.
HEADS = {
    "ZeroshotCLIP": {"clip"},
    "EMDirichlet": {"clip", "em"},
    "StatA": {"clip", "stata"},
    "LinearProbe": {"clip", "probe"},
    "TipAdapterF": {"clip", "tip_f"},
    "DLRCLIP": {"clip", "cma", "glr", "final", "fused"},
}

pytestmark = pytest.mark.skipif(not UPSTREAM, reason="UPSTREAM_DASSL names no checkout of upstream Dassl.pytorch")


@pytest.fixture(scope="module")
def told(random_tiny, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("upstream")
    path = os.pathsep.join([str(Path(UPSTREAM).resolve()), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "upstream_run.py"), str(folder), str(random_tiny), *HEADS],
        **{"cwd": folder, "env": {**os.environ, "PYTHONPATH": path}, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_upstream_is_in_charge_and_a_trainer_that_was_there_stays(told):
    assert Path(told["dassl"]).is_relative_to(Path(UPSTREAM).resolve())
    assert told["theirs"] and told["heard"] == "CoOp of __main__ stays registered, that of trainers.coop is left out\n"


@pytest.mark.parametrize("name", HEADS)
def test_one_epoch_on_upstream(name, told):
    run = told["runs"][name]
    assert set(run["heads"]) == HEADS[name]
    assert run["accuracy"] == pytest.approx(run["heads"][run["main"]], abs=0.01)  # upstream's evaluator, our report
    trains = name not in ("ZeroshotCLIP", "EMDirichlet", "StatA")
    assert bool(run["checkpoints"]) == trains and (run["moved"] or not trains)
    if run["main"] in ("probe", "tip_f"):  # a single step makes no classifier of the others
        assert run["accuracy"] > 90  # four colors: chance is 25
