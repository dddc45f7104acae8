"""Trouble with the machine: a line or two on stderr, what is kept, an exit code, and never a hang."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch

from dassl.engine import TRAINER_REGISTRY, board
from dassl.engine.reliability.trouble import explain_trouble
from dassl.engine.trainer import SimpleTrainer
from dassl.utils import close_logger, setup_logger
from dlr_clip_cli.train import parse_args
from trainers.app import predict, prediction, train
from trainers.app.configuration import setup_cfg


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """train.main with the toy trainer -> (exit code, stderr without bars, lines of stdout)."""
    monkeypatch.setattr("dassl.evaluation.passes.progress_bar", lambda iterable=None, **_: iterable or _Bar())
    monkeypatch.setattr("dassl.engine.hooks.progress.progress_bar", lambda **_: _Bar())

    def run(*pairs: str, output: str = "run", flags: tuple[str, ...] = ()):
        code = train.main(
            [
                *("--trainer", "Linear", "--seed", "3", "--output-dir", str(tmp_path / output), *flags),
                *("DATASET.NAME", "ToyColors", "DATASET.ROOT", str(tmp_path / "data"), "USE_CUDA", "False"),
                *("INPUT.SIZE", "(8, 8)", "INPUT.TRANSFORMS", "('normalize',)", "DATALOADER.NUM_WORKERS", "0"),
                *("DATALOADER.TRAIN_X.BATCH_SIZE", "4", "OPTIM.NAME", "sgd", "OPTIM.LR", "0.1", "OPTIM.MAX_EPOCH", "3"),
                *("TRAIN.CHECKPOINT_FREQ", "1", *pairs),
            ]
        )
        said = capsys.readouterr()
        return code, said.err, said.out.splitlines()

    return run


class _Bar:
    def update(self, *arguments, **options):
        pass

    clear = close = set_postfix_str = update


def failing(monkeypatch, error, epoch=1):
    """The toy trainer, ending with `error` in the second step of an epoch (from 0)."""

    class Failing(TRAINER_REGISTRY.get("Linear")):
        def forward_backward(self, batch):
            if (self.epoch, self.batch_idx) == (epoch, 1):
                raise error if isinstance(error, BaseException) else error()
            return super().forward_backward(batch)

    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Linear", Failing)


@contextlib.contextmanager
def disk_of(limit: int):
    """Files cannot grow beyond so many bytes: the kernel refuses the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_gpu_memory(run, monkeypatch, tmp_path):
    failing(monkeypatch, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."))
    code, err, _ = run()
    assert code == 1
    assert err.splitlines() == [
        "error: The GPU's memory is full (2.50 GiB more were asked for). What helps: a smaller "
        "DATALOADER.TRAIN_X.BATCH_SIZE (and TEST.BATCH_SIZE)",
        f"  kept: {tmp_path / 'run' / 'net' / 'model.pth.tar-1'}; the same command goes on from the last checkpoint",
    ]
    assert err.splitlines()[0] in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "DONE").exists()


def test_trainers_say_what_needs_less_memory():
    from trainers.dlrclip import DLRCLIP

    cfg = setup_cfg(parse_args(["--trainer", "DLRCLIP", "--output-dir", "x"]))
    assert DLRCLIP.memory_advice(cfg) == [
        "TRAINER.DLRCLIP.TEXT_CHUNK 32",
        "TRAINER.DLRCLIP.CHECKPOINTING True",
        "TRAINER.DLRCLIP.PREC amp",
    ]
    advice = explain_trouble(torch.cuda.OutOfMemoryError(""), DLRCLIP.memory_advice(cfg))
    assert advice.endswith("TEST.BATCH_SIZE), " + ", ".join(DLRCLIP.memory_advice(cfg)))


def test_memory_while_the_model_is_built(run, monkeypatch, tmp_path):
    def build_model(self):
        torch.empty(2**50)

    monkeypatch.setattr("dassl.engine.trainer.SimpleTrainer.build_model", build_model)
    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Linear", type("Linear", (SimpleTrainer,), {}))
    code, err, _ = run()
    assert code == 1 and err.startswith(
        "error: This machine's memory is full. What helps: a smaller DATALOADER.TRAIN_X"
    )
    assert err.splitlines()[1] == "  kept: no checkpoint yet"


def test_full_disk(run, tmp_path, monkeypatch):
    class Large(TRAINER_REGISTRY.get("Linear")):
        def build_model(self):
            super().build_model()
            self.net.register_buffer("ballast", torch.zeros(100_000))

    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Linear", Large)
    with disk_of(200_000):
        code, err, _ = run()
    lines = err.splitlines()
    assert code == 1 and len(lines) == 2, err
    assert lines[0].startswith("error: File too large") and "What helps: room on that disk" in lines[0]
    assert lines[1] == "  kept: no checkpoint yet"
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size >= 200_000]
    code, err, _ = run()  # room again
    assert code == 0 and json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy"] is not None


def test_a_log_that_cannot_grow_does_not_end_a_run(tmp_path, capsys):
    setup_logger(tmp_path)
    try:
        logging.getLogger("x").info("first")
        with disk_of(40):
            logging.getLogger("x").info("long " * 20)
            print("printed")
            logging.getLogger("x").info("last")
    finally:
        close_logger()
    said = capsys.readouterr()
    assert said.out.splitlines() == ["first", "long " * 20, "printed", "last"]
    assert said.err == f"warning: {tmp_path / 'log.txt'} cannot be written, it ends here: File too large\n"
    assert (tmp_path / "log.txt").read_text().startswith("first\n")


def test_curves_that_cannot_grow_do_not_end_a_run(tmp_path, caplog, capsys):
    writer = board.Board(tmp_path)
    with disk_of(200):
        for step in range(50):
            writer.add_scalar("loss", 1.0, step)
        writer.flush()
        writer.add_scalar("loss", 1.0, 51)
        writer.close()
    assert caplog.messages == ["TensorBoard's file cannot be written, its curves end here: File too large"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_loader_process_that_is_killed(run, monkeypatch, tmp_path):
    class Killing(TRAINER_REGISTRY.get("Linear")):
        def forward_backward(self, batch):
            if self.epoch == 1 and self.batch_idx == 0:
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signal.SIGKILL)
            return super().forward_backward(batch)

    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Linear", Killing)
    start = time.monotonic()
    code, err, _ = run("DATALOADER.NUM_WORKERS", "1", "TEST.NO_TEST", "True")
    assert time.monotonic() - start < 60
    assert code == 1 and err.startswith("error: A process that loads images died"), err
    assert f"kept: {tmp_path / 'run' / 'net' / 'model.pth.tar-1'};" in err and len(err.splitlines()) == 2


def test_lost_numbers(run, tmp_path):
    code, err, _ = run("OPTIM.LR", "1e38")
    assert code == 1 and err.startswith("error: Expected ") and "to be finite but it is not" in err
    assert "  images: " in err and "  last good checkpoint: none yet" in err and len(err.splitlines()) == 5
    assert (tmp_path / "run" / "not_finite.json").is_file()
    code, err, _ = run("OPTIM.LR", "1e38", flags=("--debug",), output="debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("  what may help")


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    failing(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        run()


def test_gpu_that_is_not_there(run, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, err, _ = run("USE_CUDA", "True")
    assert code == 2 and err.startswith("error: Expected a GPU for USE_CUDA True but got none: ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.version, "cuda", "12.0")
    caplog.set_level("WARNING")
    cfg = setup_cfg(parse_args(["--trainer", "Linear", "--output-dir", "x"]))
    assert cfg.USE_CUDA
    code, err, out = run("USE_CUDA", "False")
    assert code == 0 and not any("Computing on the CPU" in line for line in out)


def test_default_without_gpu_says_that_it_computes_on_the_cpu(build, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.0")
    for value, reason in (("", "CUDA_VISIBLE_DEVICES is ''"), ("0", "PyTorch finds no GPU, or no driver for it")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        caplog.clear()
        build("Linear", "USE_CUDA", True)
        assert f"Computing on the CPU: {reason} (USE_CUDA False says that this is meant)" in caplog.messages
    monkeypatch.setattr(torch.version, "cuda", None)
    caplog.clear()
    build("Linear", "USE_CUDA", True)
    assert any("this PyTorch is built without CUDA" in message for message in caplog.messages)


@pytest.mark.parametrize("where", ["file", "proc"])
def test_output_that_cannot_be_written(run, tmp_path, where):
    (tmp_path / "file").write_text("")
    output = {"file": "file/below", "proc": "/proc/none"}[where]
    code, err, _ = run(output=output)
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and output.split("/")[-1] in err


def test_memory_while_predicting(monkeypatch, capsys):
    monkeypatch.setattr(predict, "find_images", lambda paths: ([("a.png", "a.png")], {}))
    monkeypatch.setattr(predict, "load_model", lambda args: prediction.Model(None, ["cat"]))
    monkeypatch.setattr(predict, "predict", lambda *arguments: torch.empty(2**50))
    assert predict.main(["--model-dir", "x", "a.png"]) == 1
    assert capsys.readouterr().err == (
        "error: This machine's memory is full. What helps: a smaller --batch-size, or fewer DATALOADER.NUM_WORKERS\n"
    )
