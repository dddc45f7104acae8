"""The command line of scripts that draw one figure from the folder of one finished run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dassl.evaluation.predictions import Predictions, load_predictions
from dassl.utils.cli import fail
from scripts.figures.style import add_output_options, save


def open_predictions(run: Path) -> Predictions:
    """Open the predictions of a finished run.

    Args:
        run: its folder, or a file of predictions in it (`predictions-eval.safetensors`, say).

    Raises:
        ValueError: the run has not finished, or left no such file.
    """
    if not run.exists():
        raise ValueError(f"Expected the folder of a run but there is no {run}")
    if run.is_dir() and not (run / "DONE").is_file():
        raise ValueError(f"Expected a finished run but {run} has no DONE")
    return load_predictions(run)


def figure_main(
    doc: str,
    name: str,
    draw: Callable[[argparse.Namespace], Figure],
    argv: Sequence[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Run the command line of a script that draws a figure; return the exit code.

    Args:
        doc: the help text.
        name: of the figure, which goes to `RUN/figures/<name>` by default.
        draw: makes the figure from the arguments, of which `run` is the run's folder.
        argv: the command line; None: the process's.
        add_options: adds the script's own options.
    """
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    add_options(parser)
    add_output_options(parser, f"RUN/figures/{name}")
    args = parser.parse_args(argv)
    try:
        figure = draw(args)
        folder = args.run if args.run.is_dir() else args.run.parent
        for path in save(figure, args.output or folder / "figures" / name, args.formats):
            print(path)
    except (ValueError, OSError) as error:
        return fail(error)
    return 0
