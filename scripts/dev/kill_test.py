"""Kill real training runs at random moments, resume them, and compare what comes out with the run that was left alone.

    python scripts/dev/kill_test.py [--kills 20] [--trainers DLRCLIP CoOp TipAdapterF IMO] [--seed 0] [--output FOLDER]

Each trainer's run is made once without interruption. Then, for each kill, a new run is started, ended with SIGKILL
after a random time (up to what the whole run took), and started again with the same command, which must resume it to
the end. Equal means: the same metrics.json but for timings, and the same weights, optimizer, schedule and random
generators in the last checkpoint, bit by bit. With `--signal term` the runs are told to stop instead of killed.

Runs are forked off a process that has imported everything, and draw no pictures. Exit code: 0 if all are equal, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(ROOT))

import torch
from PIL import Image

from dassl.utils import load_checkpoint
from dassl.utils.cli import run_main
from dlr_clip_cli.places import python_path
from scripts.lib.grid import _work, environment
from scripts.lib.jobs import CONSOLE, Step

CONFIGS = {"DLRCLIP": "dlr", "CoOp": "coop", "TipAdapterF": "tip_adapter_f", "IMO": "imo"}
COLORS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
IMAGES = {"train": 8, "val": 2, "test": 5}  # of each class
EPOCHS = {"DLRCLIP": 3, "CoOp": 3, "TipAdapterF": 8, "IMO": 3}
# Runs of a few seconds: epochs of five or six steps, random augmentations, validation after each epoch, and checkpoints
# within epochs.
SMALL = (
    *("DATASET.NAME", "ImageFolder", "DATASET.NUM_SHOTS", "-1", "DATALOADER.TRAIN_X.BATCH_SIZE", "4"),
    *("TEST.FINAL_MODEL", "best_val", "TRAIN.CHECKPOINT_STEPS", "2", "TRAIN.CHECKPOINT_FREQ", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "USE_CUDA", "False", "FEATURE_CACHE.USE", "False"),
)
TRANSFORMS = ("random_resized_crop", "random_flip", "colorjitter", "normalize")


@dataclass(frozen=True)
class Outcome:
    """Hold what is compared: metrics without timings, and the last checkpoint of each model without them."""

    metrics: dict[str, Any]
    checkpoints: dict[str, Any]

    def differences(self, other: Outcome) -> list[str]:
        """Return the names of what differs."""
        return [
            *_differences(self.metrics, other.metrics, "metrics.json"),
            *_differences(self.checkpoints, other.checkpoints, "checkpoint"),
        ]


def read_outcome(folder: Path) -> Outcome:
    """Read the outcome of a finished run."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    del metrics["timing"]
    checkpoints = {}
    for pointer in sorted(folder.glob("*/checkpoint")):
        content = load_checkpoint(pointer.parent / pointer.read_text(encoding="utf-8").strip())
        content["engine"]["hooks"].pop("Timing", None)
        del content["engine"]["config"]  # it has the folder's name
        checkpoints[pointer.parent.name] = content
    return Outcome(metrics, checkpoints)


def _differences(one: Any, other: Any, name: str) -> Iterator[str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or not _same_bits(one, other):
            yield name
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from _differences(one[key], other[key], f"{name}/{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _differences(mine, theirs, f"{name}/{number}")
    elif one != other and not (one != one and other != other):
        yield name


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)

    return torch.equal(bits(one), bits(other))


def _run(arguments: list[str], folder: str, threads: int) -> None:
    from dassl.engine.hooks import TensorBoard  # here in the new process, where it is loaded already

    TensorBoard._pictures = lambda *arguments: None  # type: ignore[method-assign]  # half of a small run's time
    _work(Step(folder, tuple(arguments)), threads, 0)


class Runs:
    """Runs of train.py in processes of their own, which are forked off one that has imported it."""

    def __init__(self, threads: int = 1) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["trainers.app.train", "torch.utils.tensorboard"])
        self._threads = threads
        with self._import_path():  # now, so that no run's time has the imports in it
            process = self._context.Process(target=int)
            process.start()
            process.join()

    @staticmethod
    def _import_path() -> contextlib.AbstractContextManager[None]:
        return environment(PYTHONPATH=python_path())

    def start(self, arguments: Sequence[str], folder: Path) -> Any:
        """Start `train.py` with these arguments and the output folder; what it prints goes to a file there."""
        arguments = ["--output-dir", str(folder), *arguments]
        with self._import_path():
            process = self._context.Process(target=_run, args=(arguments, str(folder), self._threads))
            process.start()
        return process

    def finish(self, arguments: Sequence[str], folder: Path) -> None:
        """Run `train.py` with these arguments to the end.

        Raises:
            RuntimeError: the run failed.
        """
        process = self.start(arguments, folder)
        process.join()
        if process.exitcode:
            text = (folder / CONSOLE).read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{folder}: exit code {process.exitcode}\n{text[-3000:]}")


def paint(root: Path) -> None:
    """Paint a folder of colored pictures, to train, validate and test on."""
    rng = random.Random(0)
    for part, count in IMAGES.items():
        for name, color in COLORS.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                red, green, blue = (value + rng.randint(-55, 55) for value in color)
                picture = Image.new("RGB", (80, 72), (red, green, blue))
                picture.paste((255, 255, 255), (5 * number, 10, 5 * number + 20, 40))
                picture.save(root / part / name / f"{number}.png")


def command(trainer: str, root: Path, *options: str) -> list[str]:
    """Return the arguments of a small run on the pictures in `root`: flags, then KEY VALUE pairs."""
    config = ROOT / "configs" / "trainers" / CONFIGS[trainer] / "tiny.yaml"
    flags = ["--transforms", *TRANSFORMS, "--trainer", trainer, "--config-file", str(config), "--seed", "1"]
    flags += ["--root", str(root)]
    return [*flags, *SMALL, "OPTIM.MAX_EPOCH", str(EPOCHS[trainer]), *options]


def stop_after(runs: Runs, arguments: Sequence[str], folder: Path, seconds: float, number: int) -> int | None:
    """Start a run and send it the signal `number` after that time; return its exit code."""
    process = runs.start(arguments, folder)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        if process.is_alive():
            os.kill(process.pid, number)
    process.join()
    return process.exitcode


def check(
    runs: Runs, arguments: Sequence[str], kills: int, rng: random.Random, output: Path, number: int
) -> Iterator[tuple[float, str, list[str]]]:
    """Yield for each kill its time in seconds, the newest checkpoint then, and what differs in the resumed run.

    A run that ended before its kill is not counted: it is made again, with an earlier kill.
    """
    begin = time.monotonic()
    runs.finish(arguments, output / "whole")
    whole, seconds = read_outcome(output / "whole"), time.monotonic() - begin
    for kill in range(kills):
        moment, folder = rng.uniform(0, seconds), output / f"killed{kill}"
        while stop_after(runs, arguments, folder, moment, number) == 0:
            moment *= 0.8
            shutil.rmtree(folder)
        pointers = sorted(folder.glob("*/checkpoint"))
        newest = pointers[0].read_text(encoding="utf-8").strip() if pointers else "none"
        runs.finish(arguments, folder)
        yield moment, newest, whole.differences(read_outcome(folder))
        shutil.rmtree(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="per trainer (default: 20)")
    parser.add_argument("--trainers", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--signal", choices=("kill", "term"), default="kill")
    parser.add_argument("--output", type=Path, help="folder for the runs (default: a temporary one)")
    args = parser.parse_args(argv)
    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}[args.signal]
    runs, equal, total = Runs(), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images"
        paint(images)
        for trainer in args.trainers:
            rng, folder = random.Random(f"{trainer} {args.seed}"), (args.output or Path(temporary)) / trainer
            for moment, newest, found in check(runs, command(trainer, images), args.kills, rng, folder, number):
                total += 1
                equal += not found
                verdict = "equal" if not found else f"DIFFERENT: {', '.join(found[:5])}"
                print(f"{trainer}: {moment:.2f} s, checkpoint {newest}: {verdict}", flush=True)
    print(f"{equal} of {total} equal")
    return 0 if equal == total else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
