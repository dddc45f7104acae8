"""Measure predict.py --stream on many small files: images per second, memory, equal answers.

    python benchmarks/predict_many.py --images 200000 --folder /tmp/many [--part-size 10000]

It writes that many PNG files (once), adapts the tiny CLIP to Digits by GDA, and classifies all files by one process, by
one that is killed halfway and started again, and by two processes. The answers have to be the same bytes. Memory is the
largest resident set of a process, as the system counts it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
IN_A_FOLDER = 1000
# What a call is -> its name in the table, its processes, and whether it is killed halfway and started again.
CALLS = {"one": ("one process", 1, False), "killed": ("killed, started again", 1, True), "two": ("two", 2, False)}


def make_images(folder: Path, count: int) -> None:
    """Write small noisy PNG files, 1,000 in a folder; those that are there stay."""
    rng = np.random.default_rng(0)
    for first in range(0, count, IN_A_FOLDER):
        place = folder / f"{first // IN_A_FOLDER:05d}"
        if place.exists():
            continue
        partial = place.with_name(f"{place.name}.part")
        partial.mkdir(parents=True, exist_ok=True)
        for number in range(min(IN_A_FOLDER, count - first)):
            values = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(values).save(partial / f"{number:04d}.png", compress_level=1)
        partial.rename(place)


def digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of all parts in a folder."""
    found = hashlib.sha256()
    for part in sorted(folder.glob("part-*")):
        found.update(part.name.encode() + part.read_bytes())
    return found.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, required=True, help="for images and answers")
    parser.add_argument("--part-size", type=int, default=10_000)
    parser.add_argument("--calls", nargs="+", choices=tuple(CALLS), default=list(CALLS), help="default: all, in turn")
    args = parser.parse_args(argv)
    images, run = args.folder / f"images-{args.images}", args.folder / "run"
    make_images(images, args.images)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if not (run / "DONE").exists():
        words = ["--trainer", "GDA", "--config", "tiny", "--output-dir", str(run), "DATASET.NUM_SHOTS", "4"]
        subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, env=environment)
    rows, digests = [], set()
    for call in args.calls:
        name, processes, killed = CALLS[call]
        output = args.folder / f"parts-{call}-{os.getpid()}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "predict.py"), str(images)]
        command += ["--model-dir", str(run), "--stream", "csv", "--output", str(output)]
        command += ["--part-size", str(args.part_size)]
        began = time.monotonic()
        if killed:
            half = args.images // args.part_size // 2
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            while len(list(output.glob("part-*"))) < half and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, check=True, env=environment)
        seconds = time.monotonic() - began
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
        digests.add(digest(output))
        rows.append([name, f"{seconds:.0f}", f"{args.images / seconds:.0f}", f"{memory:.0f}"])
        print(tabulate(rows, ["call", "seconds", "images/s", "largest process so far, MiB"]), flush=True)
    print("the same bytes" if len(digests) == 1 else "DIFFERENT ANSWERS", *sorted(digests))
    return 0 if len(digests) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
