"""Methods on frozen features: as published and ours, fitted and tested side by side on the same random features.

    python benchmarks/bench_frozen.py --output out.json
    python benchmarks/bench_frozen.py --methods GDA,TIMO --classes 20 --rows 320 --output out.json

Features are those of frozen_methods.py: no image is encoded by either. Of several methods, each has a process of its
own. Our real trainer and the published computation (published/frozen/) take the same features, starts and batches. In
each round both are fitted and tested, in turning order; medians over the rounds count, and a method whose first round
takes long has one round. Both must come to the same: what is chosen on validation images is equal, and no logit of a
test image differs by more than a thousandth of the largest one (no probability by more than a hundredth, where a method
gives such). Else that is an error.

CPU seconds of all threads count. `fit` is training or fitting, with the choice on validation images: of ours, batches,
steps with their checks for numbers that are not finite, and `choose`. What neither source nor method needs, and the
published computation here lacks, is not in it: console, log, TensorBoard, checkpoints (`run` in the file). `test` is
the logits of all test images from their features, in one batch, the median of five. Settings are those of the method's
vit_b16.yaml but for --views, --epochs and what the table names: the outermost loop of a search may be cut, inner ones
are the source's. --whole cuts none, and takes hours.

Keys of a row of the JSON:
    fit, test       CPU seconds by "published" and "ours", medians; fit is None where a method fits nothing
    ratio_fit, ...  published over ours
    rounds          all seconds of each round
    run             CPU seconds of our whole run but for fit and test
    difference      largest difference of a logit, relative to the largest logit, or of a probability
    other           test images to which both give different classes
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.frozen_methods import add_sizes, make_dataset, make_trainer
from benchmarks.measure import CPUWatch, biggest
from benchmarks.published.frozen import METHODS, Published
from benchmarks.side_by_side import add_arguments, chosen_methods, measure_rows
from benchmarks.tables import made_by, seconds, table
from dassl.utils.cli import run_main

TOLERANCE = {False: 1e-3, True: 1e-2}  # of logits, relative to the largest; of probabilities
BEGIN = "<!-- frozen: begin (written by benchmarks/bench_frozen.py) -->"
END = "<!-- frozen: end -->"
KINDS = ("published", "ours")
TESTS, ENOUGH = 5, 1.0  # a test is repeated so many times, or as long as it took less than these seconds


class Run(NamedTuple):
    """A fit and its test: logits [n, C], what was chosen, CPU seconds of both, and of all else in a run."""

    logits: Tensor
    chosen: dict[str, float]
    fit: float
    test: float
    rest: float = 0.0


class Ours:
    """Our trainer, whose computations are on the clock.

    Args:
        trainer: as `make_trainer` returns it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.fitting = trainer, CPUWatch(trainer.device)
        for name in ("forward_backward", "choose"):
            setattr(trainer, name, self._timed(getattr(trainer, name)))
        trainer.train_batches = self._timed_batches(trainer.train_batches)
        trainer.write_scalar = lambda *_: None  # else the thread that writes TensorBoard's file is on the clock

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            with self.fitting:
                return function(*arguments)

        return timed

    def _timed_batches(self, function: Callable[[], Iterable[Any]]) -> Callable[[], Iterator[Any]]:
        def timed() -> Iterator[Any]:
            batches = iter(function())
            while True:
                with self.fitting:
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        return timed

    def logits(self) -> Tensor:
        """Return logits of the test images."""
        parts = [self.trainer.network(self.trainer.parse_batch_test(batch)[0]) for batch in self.trainer.test_loader]
        return torch.cat(parts)

    def run(self) -> Run:
        """Fit and test."""
        start = time.process_time()
        self.trainer.train()
        rest = time.process_time() - start - self.fitting.cpu
        self.trainer.set_model_mode("eval")
        logits, testing = tested(self.logits)
        chosen = {name: choice["value"] for name, choice in self.trainer.selected.items()}
        return Run(logits, chosen, self.fitting.cpu, testing, rest)


def run_published(published: Published, features: Tensor) -> Run:
    """Fit and test as published."""
    fitting = CPUWatch(features.device)
    with fitting:
        published.fit()
    logits, testing = tested(lambda: published.logits(features))
    return Run(logits, published.chosen, fitting.cpu, testing)


@torch.no_grad()
def tested(logits: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return the logits of the test images, and CPU seconds for them and their classes: the median of some times."""
    spent: list[float] = []
    while len(spent) < TESTS and sum(spent) < ENOUGH:
        watch = CPUWatch(torch.device("cpu"))
        with watch:
            found = logits()
            found.argmax(dim=1)
        spent.append(watch.cpu)
    return found, statistics.median(spent)


def compare(name: str, ours: Run, published: Run) -> tuple[float, int]:
    """Compare what both came to.

    Returns:
        The largest difference (see the head of the file), and the number of images with another class.

    Raises:
        RuntimeError: they differ.
    """
    probabilities = METHODS[name].probabilities
    found, wanted = ours.logits.softmax(dim=1) if probabilities else ours.logits, published.logits
    difference = float((found - wanted).abs().max() / (1.0 if probabilities else wanted.abs().max()))
    others = int((found.argmax(dim=1) != wanted.argmax(dim=1)).sum())
    own, known = ({key: round(float(value), 6) for key, value in run.chosen.items()} for run in (ours, published))
    if own != known or not difference <= TOLERANCE[probabilities]:
        raise RuntimeError(
            f"Expected {name} to come to what is published but logits differ by {difference:.2g} of the largest, "
            f"{own} is chosen where {known} is published, and {others} images are in another class"
        )
    return difference, others


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure a method in this process, and return its row."""
    torch.set_num_threads(args.threads)
    begin, kind = time.perf_counter(), METHODS[name]
    args = copy.copy(args)
    args.opts = ["DATALOADER.TEST.BATCH_SIZE", args.queries, *([] if args.whole else kind.keys), *args.opts]
    make_dataset(args)
    rounds: dict[str, dict[str, list[float]]] = {"fit": {x: [] for x in KINDS}, "test": {x: [] for x in KINDS}}
    rest, compared = [], []
    for number in range(args.rounds):
        gc.collect()
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(args, name, Path(folder))
            published, ours, test = kind(trainer), Ours(trainer), trainer.test_loader.all().values[0].clone()
            if number % 2:
                found = ours.run()
            wanted = run_published(published, test)
            if not number % 2:
                found = ours.run()
        compared.append(compare(name, found, wanted))
        rest.append(found.rest)
        for side, run in zip(KINDS, (wanted, found), strict=True):
            rounds["fit"][side].append(run.fit)
            rounds["test"][side].append(run.test)
        if sum(rounds[what][side][0] for what in rounds for side in KINDS) > args.long:
            break
    if not kind.fits:
        rounds["fit"] = {}
    medians = {what: {side: statistics.median(x) for side, x in sides.items()} for what, sides in rounds.items()}
    steps = sum(map(len, published.epochs))
    return {
        "method": name,
        "cut": "" if args.whole else kind.cut,
        "steps": steps,
        "fit": medians["fit"] or None,
        "test": medians["test"],
        **{f"ratio_{what}": x["published"] / x["ours"] if x else None for what, x in medians.items()},
        "rounds": rounds,
        "run": statistics.median(rest),
        "difference": biggest(difference for difference, _ in compared),
        "other": max(other for _, other in compared),
        "chosen": {key: float(value) for key, value in wanted.chosen.items()},
        "elapsed": time.perf_counter() - begin,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = []
    for row in result["rows"]:
        how = ", ".join(x for x in (f"{row['steps']} steps" if row["steps"] else "", row["cut"]) if x)
        cells = [row["method"], how]
        for what in ("fit", "test"):
            known = row[what]
            cells += [*map(seconds, known.values()), f"{row['ratio_' + what]:.2f}"] if known else ["-"] * 3
        rows.append([*cells, f"{row['difference']:.0e}", row["other"]])
    head = ["CPU seconds", "steps, and what is cut", "fit, as published", "ours", "times faster", "test, as published"]
    head += ["ours", "times faster", "logits differ by", "images in other classes"]
    return "\n".join([made_by(result), "", table(head, rows)])


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, METHODS)
    add_sizes(parser, rows=1600, classes=100, queries=2000)
    parser.add_argument("--epochs", type=int, default=5, help="of methods that are trained by batches (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="medians count (default: 5)")
    parser.add_argument("--long", type=float, default=10.0, help="CPU seconds of a first round that stays the only one")
    parser.add_argument("--whole", action="store_true", help="cut no search, and train as --epochs says")
    args = parser.parse_args(arguments)
    args.methods, args.opts = chosen_methods(parser, args.methods, METHODS), []
    for name, low in (("classes", 3), ("val", 1), ("queries", 8), ("views", 1), ("epochs", 1), ("rounds", 1)):
        if getattr(args, name) < low:
            parser.error(f"Expected --{name} to be at least {low} but got {getattr(args, name)}")
    if args.rows < 2 * args.classes or args.rows % args.classes:
        parser.error(f"Expected --rows to be a multiple of --classes, twice at least, but got {args.rows}")
    if args.width < 32 or args.width % 32:
        parser.error(f"Expected --width to be a multiple of 32 but got {args.width}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parse_args(given)
    torch.set_num_threads(args.threads)
    return measure_rows(
        args,
        given,
        benchmark="frozen",
        script=__file__,
        order=METHODS,
        measure=lambda name: measure(args, name),
        markdown=markdown,
        marks=(BEGIN, END),
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
