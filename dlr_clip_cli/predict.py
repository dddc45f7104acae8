"""Predict the classes of images with a model that has been trained here.

    {command} --model-dir output/... IMAGE_OR_FOLDER... [--top-k 5] [--json | --csv] [--classes "a,b,c"]

The run's own folder is all that is needed: its config, its class names and its checkpoint; the images that it was
trained on are not. A file that FewShotClassifier.save has written may stand in its place. Folders are searched for
images. The best classes of each image and their probabilities go to stdout, everything else to stderr. `result.txt` has
a line per image: its name and the numbers of its five best classes, best first, counted from 0 in the order of the
run's classes.json (or of --classes); for a saved classifier it is written where --output is given.

--stream writes the answers for a large folder as files of 10,000 images each (`PARTS/part-000000-....parquet`), in the
order of the images. A call that was ended goes on with the first part that is missing. Several processes share the
parts: torchrun --nproc_per_node N {torchrun} FOLDER --model-dir ... --stream parquet --output PARTS

Exit codes: 0 done, also when some files could not be read (each is named); 2 something given was wrong, or no file at
all could be read (one line on stderr; --debug adds the traceback); 1 anything else (one line for a full memory).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dassl.utils.cli import Parser, parse_first

from .places import import_ours, spoken


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    command = spoken("predict")
    parser = Parser(
        prog=command.removeprefix("python "),
        description=(__doc__ or "").format(
            command=command, torchrun="predict.py" if command.startswith("python ") else "-m dlr_clip_cli predict"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--model-dir", required=True, help="output folder of the training run, or a saved classifier")
    parser.add_argument("--load-epoch", type=int, help="epoch to load (default: the best one if kept, else the last)")
    parser.add_argument("--top-k", type=int, default=5, help="how many classes to show of each image (default: 5)")
    parser.add_argument("--head", help="which of the method's classifiers (default: the one that is its accuracy)")
    parser.add_argument("--classes", help='other class names, as "a,b,c" (a name with a comma in double quotes)')
    parser.add_argument(
        "--unknown",
        nargs="?",
        const="auto",
        metavar="PROBABILITY",
        help="answer '(unknown)' where no class is as probable as this (default: what the saved classifier says)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    form.add_argument("--stream", choices=("parquet", "csv"), help="write files of this kind into --output")
    parser.add_argument("--part-size", type=int, default=10_000, help="images in a file of --stream (default: 10000)")
    parser.add_argument("--output", help="folder for result.txt (default: MODEL_DIR/predictions)")
    parser.add_argument("--batch-size", type=int, help="images at a time (default: the run's for testing)")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="change a setting"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and more of what is done")
    args = parser.parse_args(argv)
    if args.stream is not None and args.output is None:
        parser.error("Expected --output, a folder, with --stream")
    for flag in ("top_k", "batch_size", "part_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            parser.error(f"Expected --{flag.replace('_', '-')} to be at least 1 but got {value}")
    if args.unknown not in (None, "auto"):
        try:
            args.unknown = float(args.unknown)
        except ValueError:
            parser.error(f"Expected --unknown to be a probability but got {args.unknown} (put images before --unknown)")
        if not 0 <= args.unknown <= 1:
            parser.error(f"Expected --unknown to be from 0 to 1 but got {args.unknown}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parse_first(lambda: parse_args(argv))
    code: int = import_ours("trainers.app.predict").run_program(argv)
    return code
