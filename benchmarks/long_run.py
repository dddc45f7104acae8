"""Watch whether a long run grows: memory, open files and files over thousands of steps and many evaluations.

    python benchmarks/long_run.py --trainer CoOp --steps 2000 --evaluations 20 [--json out.json]

Trains the bundled tiny CLIP on Digits, an epoch between two evaluations on the validation images, in this process, and
reads /proc/self after each (Linux). The first five evaluations are warm-up: growth is that of the rest. RSS is in MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate

from dassl.engine import SimpleTrainer
from dassl.engine.evaluating import EvaluatingTrainer
from dassl.engine.hooks import HookBase
from dassl.utils.cli import run_main
from trainers.app import train

CONFIGS = {"CoOp": "configs/trainers/coop/tiny.yaml", "DLRCLIP": "configs/trainers/dlr/tiny.yaml"}
SHOTS, BATCH = 4, 8  # 40 images, 5 steps in a pass over them
WARM_UP = 5  # evaluations: allocators, caches and TensorBoard's queue have their size by then


class Sample(NamedTuple):
    """The process and its run's folder at one moment."""

    step: int
    seconds: float
    rss: float  # MiB
    open_files: int
    threads: int
    log: int  # bytes of log.txt
    events: int  # bytes of TensorBoard's files


def rss() -> float:
    """Resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def size_of(folder: Path, pattern: str) -> int:
    """Bytes of all files of a pattern."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


class Sampler(HookBase):
    """Takes a sample after each evaluation in training, and repeats the training images to make an epoch long."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._start = time.perf_counter()

    def after_test(self, trainer: Any, evaluation: Any) -> None:
        if trainer.phase != "train":
            return
        gc.collect()
        folder = Path(trainer.output_dir)
        self.samples.append(
            Sample(
                trainer.global_step + 1,
                time.perf_counter() - self._start,
                rss(),
                len(os.listdir("/proc/self/fd")),
                len(os.listdir("/proc/self/task")),
                size_of(folder, "log.txt*"),
                size_of(folder, "events.out.*"),
            )
        )


def growth(samples: Sequence[Sample]) -> float:
    """The largest RSS after the warm-up over that at its end, minus 1."""
    warm = samples[min(WARM_UP, len(samples)) - 1 :]
    return max(sample.rss for sample in warm) / warm[0].rss - 1


@contextlib.contextmanager
def sampled() -> Iterator[Sampler]:
    """Runs in the block have a Sampler."""
    sampler, build = Sampler(), SimpleTrainer.build_hooks
    SimpleTrainer.build_hooks = lambda self: [*build(self), sampler]  # type: ignore[method-assign]
    try:
        yield sampler
    finally:
        SimpleTrainer.build_hooks = build  # type: ignore[method-assign]


def measure(trainer: str, steps: int, evaluations: int, pairs: Sequence[str] = ()) -> list[Sample]:
    """The samples of a run of `steps` steps in as many epochs as there are evaluations.

    Raises:
        ValueError: the run fails, or its steps cannot be shared out among the evaluations.
    """
    per_epoch = 10 * SHOTS // BATCH
    if steps % (evaluations * per_epoch):
        raise ValueError(f"Expected --steps to be a multiple of {evaluations * per_epoch} but got {steps}")
    epochs = steps // per_epoch
    every = epochs // evaluations
    best, seen = EvaluatingTrainer.test, {"epochs": 0}

    def test(self: EvaluatingTrainer, split: str | None = None) -> float:
        seen["epochs"] += 1  # best_val tests after each epoch: most are left out
        skip = self.phase == "train" and seen["epochs"] % every
        return -1.0 if skip else best(self, split)

    with tempfile.TemporaryDirectory() as folder, sampled() as sampler:
        EvaluatingTrainer.test = test  # type: ignore[method-assign]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                code = train.main(
                    [
                        *("--trainer", trainer, "--config-file", CONFIGS[trainer], "--seed", "1", "--no-cache"),
                        *("--output-dir", folder, "USE_CUDA", "False", "DATALOADER.NUM_WORKERS", "0"),
                        *("DATASET.NUM_SHOTS", str(SHOTS), "DATALOADER.TRAIN_X.BATCH_SIZE", str(BATCH)),
                        *("OPTIM.MAX_EPOCH", str(epochs), "TEST.FINAL_MODEL", "best_val", "TRAIN.PRINT_FREQ", "5"),
                        *pairs,
                    ]
                )
        finally:
            EvaluatingTrainer.test = best  # type: ignore[method-assign]
        if code:
            raise ValueError(f"Expected the run to end well but its exit code is {code}")
    return sampler.samples


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainer", choices=sorted(CONFIGS), default="CoOp")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file to write the samples to")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config pairs; must come last")
    args = parser.parse_args(argv)
    try:
        samples = measure(args.trainer, args.steps, args.evaluations, args.opts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [[s.step, f"{s.seconds:.0f}", f"{s.rss:.1f}", s.open_files, s.threads, s.log, s.events] for s in samples]
    heads = ["step", "seconds", "RSS MiB", "open files", "threads", "log.txt bytes", "TensorBoard bytes"]
    print(tabulate(rows, heads, tablefmt="pipe"))
    warm = samples[min(WARM_UP, len(samples)) - 1 :]
    print(f"\nRSS after warm-up: {warm[0].rss:.1f} MiB, at most {100 * growth(samples):+.2f} %")
    print(f"Open files after warm-up: {sorted({sample.open_files for sample in warm})}")
    if args.json:
        args.json.write_text(json.dumps([sample._asdict() for sample in samples], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
