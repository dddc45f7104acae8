"""What trainers written for upstream expect beside names and files: their own loops, tests and consoles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from programs import run_program

from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils.checkpoints import restore
from trainers.compat import first_come_first_served

from .conftest import Linear

ROOT = Path(__file__).parents[3]


class OwnLoop(Linear):
    """Trains in a loop of its own, as CLAP's trainers do."""

    def train(self):
        self.before_train()
        for self.epoch in range(self.max_epoch):  # noqa: B020
            self.run_epoch()
        self.after_train()


class OwnLoopAlone(Linear):
    """The same without a single call of ours."""

    def train(self):
        for self.epoch in range(self.max_epoch):  # noqa: B020
            for self.batch_idx, batch in enumerate(self.train_loader_x):  # noqa: B020
                self.forward_backward(batch)
        return "done"

    def update_lr(self, names=None):
        pass


class OwnTest(Linear):
    """Tests in a loop of its own."""

    def test(self, split=None):
        self.set_model_mode("eval")
        self.evaluator.reset()
        for batch in self.test_loader:
            input, label = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(input), label)
        return next(iter(self.evaluator.evaluate().values()))


@pytest.fixture(autouse=True)
def registered_here(monkeypatch):
    for cls in (OwnLoop, OwnLoopAlone, OwnTest):
        monkeypatch.setitem(TRAINER_REGISTRY._obj_map, cls.__name__, cls)


def records(folder: Path) -> dict:
    assert (folder / "DONE").is_file() and (folder / "config.yaml").is_file() and (folder / "classes.json").is_file()
    return json.loads((folder / "metrics.json").read_text())


def test_a_train_of_its_own_leaves_the_records_of_a_run(build, tmp_path):
    trainer = build("OwnLoop")
    trainer.train()
    metrics = records(tmp_path / "run")
    assert metrics["mode"] == "train" and metrics["accuracy"] == trainer.evaluation.heads["main"]["accuracy"]
    assert metrics["test"]["n"] == 12 and trainer.phase == "idle"


def test_also_one_that_calls_nothing_of_ours(build, tmp_path):
    trainer = build("OwnLoopAlone")
    assert trainer.train() == "done"
    metrics = records(tmp_path / "run")
    assert metrics["accuracy"] is None and metrics["params"]["trainable"] > 0
    with torch.no_grad():
        trainer.test()
    assert records(tmp_path / "run")["test"]["n"] == 12


def test_a_train_of_its_own_that_fails_leaves_no_marker(build, tmp_path, monkeypatch):
    trainer = build("OwnLoop")
    monkeypatch.setattr(trainer, "forward_backward", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (tmp_path / "run" / "DONE").exists() and trainer.phase == "idle"


@pytest.mark.parametrize("how", ["train", "test"])
def test_a_test_of_its_own_is_recorded_with_its_images(build, tmp_path, how):
    trainer = build("OwnTest")
    getattr(trainer, how)()
    metrics = records(tmp_path / "run")
    head = metrics["test"]["heads"]["main"]
    assert metrics["test"]["n"] == 12 and metrics["accuracy"] == head["accuracy"] and "macro_f1" in head
    assert metrics["mode"] == {"train": "train", "test": "eval"}[how]


@pytest.mark.parametrize("frequency", [-1, 0])
def test_no_numbered_checkpoints_but_the_last(build, tmp_path, frequency):
    build("Linear", "TRAIN.CHECKPOINT_FREQ", frequency).train()
    names = {path.name for path in (tmp_path / "run" / "net").glob("model.pth.tar-*") if path.suffix != ".sha256"}
    assert names == {"model.pth.tar-3"}


@pytest.mark.parametrize("recount", [True, False])
def test_upstreams_checkpoint_with_warm_up_goes_on_where_it_was(make_cfg, tmp_path, recount):
    """Upstream saves its warm-up as an object, which is not read, and whose own position stands still."""
    pairs = ("OPTIM.MAX_EPOCH", 10, "OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_TYPE", "constant", "OPTIM.LR", 2e-3)
    cfg = make_cfg("Linear", *pairs, "OPTIM.WARMUP_RECOUNT", recount)

    def schedule():
        optim = build_optimizer(torch.nn.Linear(2, 2), cfg.OPTIM)
        return optim, build_lr_scheduler(optim, cfg.OPTIM)

    whole, steps = schedule()
    rates = []
    for _ in range(10):
        rates.append(whole.param_groups[0]["lr"])
        whole.step()
        steps.step()
    optim, sched = schedule()
    model = torch.nn.Linear(2, 2)
    content = {"state_dict": model.state_dict(), "epoch": 6, "optimizer": whole.state_dict(), "scheduler": None}
    assert restore(content, "upstream.pth", model, optim, sched) == 6
    assert optim.param_groups[0]["lr"] == pytest.approx(rates[6]) and rates[6] < 2e-3


SILENT = """
import logging, sys
import dassl.engine
from tests.dassl.engine import conftest
from dassl.data.datasets import DATASET_REGISTRY
from dassl.config import get_cfg_default
from dassl.utils import setup_logger

mode, root = sys.argv[1:]
DATASET_REGISTRY._obj_map["ToyColors"] = conftest.ToyColors
dassl.engine.TRAINER_REGISTRY._obj_map["Linear"] = conftest.Linear
cfg = get_cfg_default()
cfg.merge_from_list(["TRAINER.NAME", "Linear", "DATASET.NAME", "ToyColors", "SEED", 3, "USE_CUDA", False, "OUTPUT_DIR",
    root + "/run", "DATASET.ROOT", root + "/data", "INPUT.SIZE", (8, 8), "INPUT.TRANSFORMS", ("normalize",),
    "DATALOADER.NUM_WORKERS", 0, "OPTIM.MAX_EPOCH", 1, "OPTIM.LR", 0.1])

class Tee:
    def __init__(self): self.file, self.console = open(root + "/own.txt", "w"), sys.stdout
    def write(self, text): self.file.write(text); self.console.write(text)
    def flush(self): self.file.flush(); self.console.flush()

if mode == "own": sys.stdout = Tee()
if mode == "setup": setup_logger(root + "/run")
if mode == "basic": logging.basicConfig(level=logging.WARNING)
dassl.engine.build_trainer(cfg).train()
sys.stdout.flush()
"""


@pytest.mark.parametrize("mode", ["nothing", "own", "setup", "basic"])
def test_lines_reach_the_console_where_nobody_has_set_logging_up(tmp_path, mode):
    (tmp_path / "program.py").write_text(SILENT)
    result = run_program([tmp_path / "program.py", mode, tmp_path], ROOT)
    assert result.returncode == 0, result.stderr
    heard = [line for line in result.stdout.splitlines() if line.startswith("* accuracy: ")]
    assert len(heard) == (0 if mode == "basic" else 1)  # who asks for warnings gets warnings
    assert ("epoch [1/1] batch" in result.stdout) == (mode != "basic")
    if mode == "own":  # others replace stdout to keep a log: the results are in it
        assert heard[0] in (tmp_path / "own.txt").read_text()


class Registry:
    """Upstream's, as far as it matters."""

    def __init__(self):
        self._obj_map = {}

    def register(self, obj=None, force=False):
        def add(target):
            if target.__name__ in self._obj_map and not force:
                raise KeyError(target.__name__)
            self._obj_map[target.__name__] = target
            return target

        if obj is None:
            return add
        add(obj)
        return None

    def get(self, name):
        return self._obj_map[name]

    def registered_names(self):
        return list(self._obj_map)


def made(module: str) -> type:
    return type("CoOp", (), {"__module__": module})


@pytest.mark.parametrize("registry", [Registry, type(TRAINER_REGISTRY)])
@pytest.mark.parametrize("order", [("dlr_clip.coop", "trainers.coop"), ("trainers.coop", "dlr_clip.coop")])
def test_who_registers_a_name_first_keeps_it(registry, order, caplog):
    names = registry() if registry is Registry else registry("TRAINER")
    first_come_first_served(names, "dlr_clip")
    first_come_first_served(names, "dlr_clip")  # imported twice, say
    first, second = map(made, order)
    assert names.register()(first) is first and names.register()(second) is second
    assert names.get("CoOp") is first
    assert f"CoOp of {order[0]} stays registered, that of {order[1]} is left out" in caplog.text
    names.register(force=True)(second)
    assert names.get("CoOp") is second


def test_two_of_others_are_still_refused():
    names = Registry()
    first_come_first_served(names, "dlr_clip")
    names.register()(made("trainers.coop"))
    with pytest.raises(KeyError):
        names.register()(made("trainers.prograd"))


def test_trainers_of_ours_are_no_own_loops():
    assert not hasattr(TrainerX.train, "__wrapped__") and hasattr(OwnLoop.train, "__wrapped__")
