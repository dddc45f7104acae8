"""Check the tests: change one line of the code at a time, in a copy, and run the tests that should fail.

    python scripts/dev/mutate.py [NUMBER ...]

For each change: the first test that failed, or SURVIVED. Exit code 1 if one survived, 2 if a change no longer fits the
code. The copy has the tracked files of the checkout as they are on the disk.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    """One line changed, and the tests that should fail then."""

    what: str
    file: str
    old: str  # a part of one line, once in the file
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "sign of the distillation term",
        "trainers/dlrclip/skd.py",
        "return temperature**2 * F.kl_div(",
        "return -(temperature**2) * F.kl_div(",
        ("tests/trainers/dlrclip/test_skd.py",),
    ),
    Mutation(
        "the teacher learns, too",
        "trainers/dlrclip/skd.py",
        "teacher_logits.detach().float()",
        "teacher_logits.float()",
        ("tests/trainers/dlrclip/test_skd.py",),
    ),
    Mutation(
        "the gradient of MMA's adapters is their own",
        "trainers/modules/cross_modal_adapter.py",
        "_ScaledGradient.apply(y, 1.0 / factor)",
        "y",
        ("tests/trainers/dlrclip/test_cma.py",),
    ),
    Mutation(
        "order of the few-shot picks",
        "dassl/data/datasets/base_dataset.py",
        "picked.extend(draw.sample(items, num_shots))",
        "picked.extend(draw.sample(items[::-1], num_shots))",
        ("tests/datasets/test_splits.py",),
    ),
    Mutation(
        "base classes rounded down",
        "datasets/splits.py",
        "middle = -(-len(labels) // 2)",
        "middle = len(labels) // 2",
        ("tests/datasets/test_splits.py",),
    ),
    Mutation(
        "beta's grid without its end",
        "trainers/dlrclip/glr.py",
        "tuple(i / 50 for i in range(51))",
        "tuple(i / 50 for i in range(50))",
        ("tests/trainers/dlrclip/test_glr.py",),
    ),
    Mutation(
        "momentum of the teacher's moving average",
        "trainers/imo/dino.py",
        "ours.mul_(momentum).add_(theirs.detach(), alpha=1 - momentum)",
        "ours.mul_(1 - momentum).add_(theirs.detach(), alpha=momentum)",
        ("tests/trainers/imo/test_dino.py",),
    ),
    Mutation(
        "GLR's residual without its scale",
        "trainers/dlrclip/glr.py",
        "return clip_logits + self.res_scale * delta, alpha",
        "return clip_logits + delta, alpha",
        ("tests/trainers/dlrclip/test_glr.py",),
    ),
    Mutation(
        "zero-shot weights not normalized",
        "trainers/clip/templates.py",
        "return F.normalize(total / len(templates), dim=-1)",
        "return total / len(templates)",
        ("tests/trainers/clip/test_templates.py",),
    ),
    Mutation(
        "the best model replaced by an equal one",
        "dassl/engine/hooks/checkpoint.py",
        "if result > trainer.best_result:",
        "if result >= trainer.best_result:",
        ("tests/dassl/engine/test_run.py",),
    ),
    Mutation(
        "a resumed run begins its epoch's images anew",
        "dassl/data/sharding.py",
        "for batch in range(skipped, batches):",
        "for batch in range(batches):",
        ("tests/dassl/engine/test_exact_resume.py",),
    ),
)


def mutated(mutation: Mutation, root: Path) -> str:
    """Return the file's text with the change.

    Raises:
        ValueError: the line is not there, or more than once.
    """
    text = (root / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        found = text.count(mutation.old)
        raise ValueError(f"Expected {mutation.file} to have {mutation.old!r} once but found it {found} times")
    return text.replace(mutation.old, mutation.new)


def copy_of(root: Path, target: Path) -> None:
    """Copy the tracked files of a checkout, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run(mutation: Mutation, tree: Path) -> tuple[str, float]:
    """Run the tests with the change in a copy of the checkout, then undo the change.

    Returns:
        the first test that failed, or "" for none; and the seconds that the tests took.
    """
    path = tree / mutation.file
    before = path.read_text(encoding="utf-8")
    path.write_text(mutated(mutation, tree), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *mutation.tests],
            cwd=tree, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
    finally:
        path.write_text(before, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise ValueError(f"Expected pytest to run {mutation.tests} but got: {(done.stdout + done.stderr)[-500:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    seconds = re.search(r"in ([\d.]+)s", done.stdout)
    return (failed.group(1) if failed else ""), float(seconds.group(1)) if seconds else 0.0


def results(numbers: Sequence[int]) -> Iterator[tuple[int, Mutation, str, float]]:
    """Yield of each change its number (from 1), the change, the test that failed, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_of(ROOT, tree)
        for number in numbers:
            mutation = MUTATIONS[number - 1]
            yield number, mutation, *run(mutation, tree)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="which of them (default: all)")
    args = parser.parse_args(argv)
    numbers = args.numbers or list(range(1, len(MUTATIONS) + 1))
    survived = 0
    try:
        if not set(numbers) <= set(range(1, len(MUTATIONS) + 1)):
            raise ValueError(f"Expected numbers from 1 to {len(MUTATIONS)} but got {numbers}")
        for number, mutation, test, seconds in results(numbers):
            survived += not test
            print(f"{number:2} {mutation.what}: {test or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
