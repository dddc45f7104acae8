"""Compute how far a mixture of DLR-CLIP's branches could reach if it were fitted to the test images themselves.

    python scripts/dev/mixture_ceiling.py output/digits/DLRCLIP output/shapes/DLRCLIP

For finished runs with FUSION mixture. Beside the accuracy of the head `mixed`, whose weights come from few validation
images, the table has the accuracy of the same mixture with its weights fitted to all test images and their labels (an
oracle: no method could know them), and the share of test images that at least one branch classifies correctly, which no
mixture of these branches is likely to pass. Mean over runs, in percent. Reads predictions.safetensors, which must have
the logits of all classes (TEST.PREDICTIONS_MB).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.evaluation.predictions import Predictions
from dassl.utils import InputError
from dassl.utils.cli import fail, run_main
from scripts.figures.command import open_predictions
from scripts.lib.runs import find_runs
from trainers.dlrclip.mixture import Mixture

MIXED = "mixed"
BRANCHES = ("clip", "cma", "glr", "proto", "proto_patch", "proto_cma")


def ceiling(predictions: Predictions) -> tuple[float, float, float]:
    """Return the accuracies of `mixed` and of the oracle's mixture, and the share that any branch has right, in %.

    Raises:
        InputError: the run has no head `mixed`, or did not keep all logits.
    """
    if MIXED not in predictions.heads or predictions.logits is None:
        raise InputError(f"Expected a run with the head {MIXED} and all logits kept but got heads {predictions.heads}")
    names = [name for name in BRANCHES if name in predictions.heads]
    labels = torch.from_numpy(predictions.labels).long()
    logits = {name: torch.from_numpy(predictions.logits[predictions.head(name)]) for name in names}
    oracle = Mixture(names, ridge=0.0)
    oracle.fit(logits, labels)
    best = oracle(logits).argmax(1) == labels
    some = torch.stack([value.argmax(1) == labels for value in logits.values()]).any(0)
    own = torch.from_numpy(predictions.correct(MIXED))
    own_share, best_share, some_share = (100 * float(part.float().mean()) for part in (own, best, some))
    return own_share, best_share, some_share


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders that hold finished runs")
    args = parser.parse_args(argv)
    groups: dict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)
    try:
        runs, _ = find_runs(args.folders)
        for run in runs:
            groups[run.dataset(), run.shots].append(ceiling(open_predictions(run.folder)))
        if not groups:
            raise InputError("Expected finished runs below the folders but found none")
    except (ValueError, OSError) as error:
        return fail(error)
    rows = [
        (dataset, shots, len(values), *(f"{statistics.fmean(column):.1f}" for column in zip(*values, strict=True)))
        for (dataset, shots), values in sorted(groups.items())
    ]
    head = ["dataset", "shots", "runs", "mixed", "weights fitted to the test images", "any branch right"]
    print(tabulate(rows, head, tablefmt="pipe", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
