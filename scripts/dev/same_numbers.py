"""Check that two checkouts of this project give the same numbers, bit for bit on the CPU.

    python scripts/dev/same_numbers.py BEFORE AFTER --output FOLDER

BEFORE and AFTER are folders that hold a checkout each. For every trainer that BEFORE registers, and for the main job
(DLRCLIP with 16 shots), it
* trains in each checkout, with two shots and at most three epochs, and compares metrics.json (without its times) and
  the logits of every head of every test image;
* classifies a few pictures with predict.py of each checkout, and compares what is printed;
* evaluates with AFTER what BEFORE has trained (its run folders and checkpoints), and compares the same.

Runs that FOLDER holds already are not made again, so that BEFORE runs once while AFTER changes (delete FOLDER/after).
Features of images are computed anew in every run: a cached one would hide a difference. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

SHORT = ("OPTIM.MAX_EPOCH", "3", "DATASET.NUM_SHOTS", "2")
ADAPTERS = "imo"  # the run whose adapters the methods on corrected features use
# Name of the run -> trainer, configuration, settings beyond those of all short runs.
MAIN_JOB: dict[str, tuple[str, str, tuple[str, ...]]] = {"main": ("DLRCLIP", "tiny", ("DATASET.NUM_SHOTS", "16"))}
EXTRA = {
    "dlrclip_shared": ("DLRCLIP", "tiny_shared", SHORT),
    "dlrclip_robust": ("DLRCLIP", "tiny", (*SHORT, "TRAINER.DLRCLIP.FUSION", "robust")),
    "dlrclip_views": ("DLRCLIP", "tiny", (*SHORT, "INPUT.VIEWS", "2")),
    "dlrclip_chunks": ("DLRCLIP", "tiny", (*SHORT, "TRAINER.DLRCLIP.TEXT_CHUNK", "4")),
    "dlrclip_no_skd": ("DLRCLIP", "tiny", (*SHORT, "TRAINER.DLRCLIP.SKD", "False")),
    "dlrclip_amp": ("DLRCLIP", "tiny", (*SHORT, "TRAINER.DLRCLIP.PREC", "amp")),
    "linearprobe_text": ("LinearProbe", "tiny_text", SHORT),
    "emdirichlet_zeroshot": ("EMDirichlet", "tiny_zeroshot", SHORT),
    "transclip_zeroshot": ("TransCLIP", "tiny_zeroshot", SHORT),
    "coop_views": ("CoOp", "tiny", (*SHORT, "INPUT.VIEWS", "2")),
    "mma_views": ("MMA", "tiny", (*SHORT, "INPUT.VIEWS", "2")),
    "coop_csc": ("CoOp", "tiny", (*SHORT, "TRAINER.COOP.CSC", "True")),
}
OWN = {"CLIPLoRA": ("TRAINER.CLIPLORA.N_ITERS", "8"), "TwoStageFS": ("TRAINER.TWOSTAGEFS.N_ITERS", "8")}
CORRECTED = ("TipAdapterPP", "TipXPP")
UNTESTED = ("timing", "version")  # keys of metrics.json that are not compared


def jobs_of(checkout: Path) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Return the runs to make, in order: name -> trainer, configuration, settings."""
    code = "import trainers; from dassl.engine import TRAINER_REGISTRY; print(*TRAINER_REGISTRY.registered_names())"
    names = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True, text=True
    ).stdout.split()
    short = {name.lower(): (name, "tiny", (*SHORT, *OWN.get(name, ()))) for name in names}
    return {**short, **EXTRA, **MAIN_JOB}


def call(checkout: Path, script: str, *arguments: str) -> str:
    """Run a script of a checkout on one thread; return what it prints.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, str(checkout / script), *arguments],
        cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        printed = (done.stdout + done.stderr)[-1500:]
        raise RuntimeError(f"{script} {' '.join(arguments)} gave {done.returncode}: {printed}")
    return done.stdout


def train(checkout: Path, job: tuple[str, str, tuple[str, ...]], folder: Path, adapters: Path) -> None:
    """Train and evaluate in `folder`, unless a finished run is there."""
    if (folder / "DONE").exists():
        return
    trainer, config, settings = job
    if trainer in CORRECTED:
        settings = (*settings, "MODEL.IMO_WEIGHTS", str(adapters))
    call(
        checkout, "train.py", "--trainer", trainer, "--config", config, "--seed", "1", "--no-cache",
        "--output-dir", str(folder), *settings,
    )  # fmt: skip


def predict(checkout: Path, run: Path, pictures: Path) -> list[Any]:
    """Return what predict.py says of the pictures: classes and probabilities of each."""
    answer = json.loads(call(checkout, "predict.py", "--model-dir", str(run), "--json", "--cpu", str(pictures)))
    return [answer["head"], [image["predictions"] for image in answer["images"]]]


def evaluate(checkout: Path, run: Path, job: tuple[str, str, tuple[str, ...]], folder: Path, adapters: Path) -> None:
    """Evaluate a run that another checkout made, unless that was done."""
    if (folder / "DONE").exists():
        return
    trainer, config, settings = job
    if trainer in CORRECTED:
        settings = (*settings, "MODEL.IMO_WEIGHTS", str(adapters))
    saved = ("--model-dir", str(run)) if any(run.glob("*/checkpoint")) else ()  # zero-shot CLIP saves nothing
    call(
        checkout, "train.py", "--trainer", trainer, "--config", config, "--seed", "1", "--no-cache", "--eval-only",
        *saved, "--output-dir", str(folder), *settings,
    )  # fmt: skip


def metrics(run: Path) -> dict[str, Any]:
    """Return what metrics.json says, less what no two runs share."""
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in UNTESTED}


def differences(one: Path, other: Path, only: Sequence[str] = ()) -> list[str]:
    """Return the names of what differs between two runs: keys of metrics.json, and predicted tensors.

    Args:
        only: the keys to compare; empty: all.
    """
    a, b = metrics(one), metrics(other)
    found = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key) and (not only or key in only)]
    logits = [load_file(run / "predictions.safetensors") for run in (one, other)]
    for name in sorted({*logits[0], *logits[1]}):
        pair = [tensors.get(name) for tensors in logits]
        if pair[0] is None or pair[1] is None or not torch.equal(pair[0], pair[1]):
            found.append(f"predictions/{name}")
    return found


def make_pictures(folder: Path, count: int = 6) -> None:
    """Draw pictures from seeded noise, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        small = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def check(name: str, job: tuple[str, str, tuple[str, ...]], sides: dict[str, Path], output: Path) -> list[str]:
    """Make one job's runs; return what differs."""
    found: list[str] = []
    pictures, runs = output / "pictures", {side: output / side / name for side in sides}
    adapters = {side: output / side / ADAPTERS for side in sides}
    for side, checkout in sides.items():
        train(checkout, job, runs[side], adapters[side])
    found += [f"trained: {key}" for key in differences(runs["before"], runs["after"])]
    answers: dict[str, Any] = {}
    for side, checkout in sides.items():
        kept = output / side / f"{name}.predict.json"
        if not kept.exists():
            kept.write_text(json.dumps(predict(checkout, runs[side], pictures)))
        answers[side] = json.loads(kept.read_text())
    if answers["before"] != answers["after"]:
        found.append("predict.py")
    again = output / "after" / f"{name}.reloaded"
    evaluate(sides["after"], runs["before"], job, again, adapters["before"])
    compared = ("accuracy", "test", "data_digest")  # an evaluation knows nothing of the training
    found += [f"reloaded: {key}" for key in differences(runs["before"], again, compared)]
    if predict(sides["after"], runs["before"], pictures) != answers["before"]:
        found.append("predict.py on the old run")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="folder of the checkout whose numbers count")
    parser.add_argument("after", type=Path, help="folder of the checkout to compare")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of runs (default: all)")
    args = parser.parse_args(arguments)
    sides = {"before": args.before.resolve(), "after": args.after.resolve()}
    output = args.output.resolve()
    make_pictures(output / "pictures")
    jobs = jobs_of(sides["before"])
    unknown = set(args.only or ()) - set(jobs)
    if unknown:
        parser.error(f"Expected --only to be among {', '.join(jobs)} but got {', '.join(sorted(unknown))}")
    failed = 0
    for name, job in jobs.items():
        if args.only and name not in args.only:
            continue
        try:
            found = check(name, job, sides, output)
        except (RuntimeError, OSError, ValueError) as error:
            found = [f"error: {error}"]
        failed += bool(found)
        print(f"{name}: {', '.join(found) if found else 'the same'}", flush=True)
    print(f"{failed} of {len(args.only or jobs)} runs differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
