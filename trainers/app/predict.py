"""Run predict.py and `dlr-clip predict`: exit codes, and what goes to stdout."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence

from dassl.engine.reliability.trouble import explain_trouble
from dassl.utils import InputError, one_line
from dassl.utils.cli import SETUP_ERRORS, fail, given_wrongly, run_main
from dlr_clip_cli.predict import parse_args

from .answers import print_csv, print_json, print_table, write_result
from .prediction import find_images, load_model, predict
from .streaming import stream_program


def run_program(argv: Sequence[str] | None = None) -> int:
    """Run the command line as the program of this process; return the exit code."""
    return run_main(lambda: main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.debug else logging.WARNING)  # to stderr
    try:
        with contextlib.redirect_stdout(sys.stderr):  # trainers may print; stdout is for the answers
            try:
                if args.stream is not None:
                    return stream_program(args)
                files, unreadable = find_images(args.images)
                if not files:
                    raise InputError(next(iter(unreadable.values())))
                model = load_model(args)
            except SETUP_ERRORS as error:
                if given_wrongly(error):
                    return fail(error, args.debug)
                raise
            predictions, bad, head = predict(model, files, args.head)
        names = model.names
        unreadable |= bad
        for reason in unreadable.values():
            print(f"skipped: {one_line(reason)}", file=sys.stderr)
        if not predictions:
            raise InputError(f"Expected images that can be read but could read none of {len(files)}")
        write_result(args, predictions, names)
        if args.json:
            print_json(predictions, names, args.top_k, unreadable, head)
        elif args.csv:
            print_csv(predictions, names, args.top_k)
        else:
            print_table(predictions, names, args.top_k)
        sys.stdout.flush()
        if unreadable:
            print(f"{len(predictions)} images predicted, {len(unreadable)} skipped", file=sys.stderr)
    except InputError as error:
        return fail(error, args.debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain_trouble(error, batches="a smaller --batch-size")
        if args.debug or not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0
