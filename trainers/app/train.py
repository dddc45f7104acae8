"""Run train.py and `dlr-clip train`: exit codes, signals, several processes."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from dassl.engine.reliability.trouble import RunStoppedError
from dassl.utils import InputError, close_logger, distributed, note_in_log, stopping
from dassl.utils.cli import SETUP_ERRORS, fail, given_wrongly, run_main
from dlr_clip_cli.places import spoken
from dlr_clip_cli.train import parse_args

from .building import build, explained


def run_program(argv: Sequence[str] | None = None) -> int:
    """Run the command line as the program of this process; return the exit code."""
    code = run_main(lambda: main(argv))
    if hasattr(signal, "SIGCHLD"):  # torch's handler raises where a loader's process is ended together with this one
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    code, debug = 1, False
    with stopping.watching():
        try:
            distributed.connect()
            with _silent_unless_main():  # --help, and errors that all processes make
                args = parse_args(argv)
            debug = args.debug
            code = _run(args)
            if code == 0:
                distributed.stop()
        except (Exception, stopping.StoppedError) as error:
            if stopping.noted() and not distributed.is_peer_lost(error):  # the signal has hit others too, say a worker
                error = stopping.StoppedError(stopping.noted())
            stop = error if isinstance(error, stopping.StoppedError) else None
            code = 1 if stop is None else stop.exit_code
            lost = stop is not None or distributed.is_peer_lost(error)
            message = _why_it_ends(error, argv) if lost else ""
            # If the work was kept, all processes have come to the same place: rank 0, which has the log, says so.
            kept = stop is not None and stop.kept
            if distributed.is_main() if kept else distributed.first_to_fail():
                if isinstance(error, RunStoppedError):
                    message = f"error: {error}"
                    if debug and error.__cause__ is not None:
                        traceback.print_exception(error.__cause__)
                elif not lost:
                    raise
                note_in_log(message)
                print(message, file=sys.stderr)
            if kept:
                distributed.stop()
        finally:
            close_logger()
    return code


def _why_it_ends(error: BaseException, argv: Sequence[str] | None) -> str:
    """Return one line, with the command that goes on."""
    if isinstance(error, stopping.StoppedError) and (error.kept or distributed.world_size() == 1):
        command = f"{spoken('train')} {shlex.join(sys.argv[1:] if argv is None else argv)}"
        if distributed.launched():
            command = f"the same torchrun command ({command})"
        stopping.ignore_further()
        if error.kept:
            return f"stopped by {error}, and what was done is kept; it goes on with: {command}"
        return f"stopped by {error}; to start again, from the last checkpoint if there is one: {command}"
    return f"error: {distributed.why_it_ends(error)}"


def _run(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as held:
        try:
            trainer = build(args, held)
        except SETUP_ERRORS as error:
            if given_wrongly(error):
                return _fail(error, args.debug)
            raise
        try:
            with explained(trainer.cfg, trainer):
                run(trainer, args)
        except InputError as error:  # say a bad image, which is found only when its batch is read
            return _fail(error, args.debug)
        return 0


def run(trainer: Any, args: argparse.Namespace) -> None:
    """Do what was asked for with a trainer that is ready."""
    if args.dry_run:
        trainer.dry_run()
    elif args.eval_only:
        trainer.test()
    elif not args.no_train:
        trainer.train()


def _fail(error: BaseException, debug: bool) -> int:
    # Of several processes that meet the same error, one says it.
    return fail(error, debug) if distributed.first_to_fail() else 2


@contextlib.contextmanager
def _silent_unless_main() -> Iterator[None]:
    if distributed.is_main():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
