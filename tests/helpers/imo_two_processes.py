"""Runs train.py's command lines in this process (one of a job, or alone) and notes the loss of every step.

    imo_two_processes.py SPEC.json [kill]

SPEC.json is a list of argument lists. The first process writes SPEC.losses.json. With "kill", process 1 kills itself
in the second epoch of the first run.
"""

import json
import os
import signal
import sys
from pathlib import Path

from dassl.engine.hooks import HookBase
from dassl.utils import close_logger, distributed
from dlr_clip_cli.train import parse_args
from trainers.app.building import build


class Losses(HookBase):
    """Notes the loss that the engine shows of each step."""

    def __init__(self, kill):
        self.values, self.kill = [], kill

    def after_step(self, trainer):
        self.values.append(trainer.stats.summary["loss"])
        if self.kill and trainer.epoch == 1 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(argv, kill=False):
    distributed.connect()
    args = parse_args(argv)
    trainer = build(args)
    losses = Losses(kill)
    trainer.register_hooks([losses])
    trainer.train()
    distributed.stop()
    close_logger()
    return losses.values


def main(spec, kill=False):
    found = [run(argv, kill) for argv in json.loads(Path(spec).read_text())]
    if os.environ.get("RANK", "0") == "0":
        Path(spec).with_suffix(".losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["kill"])
