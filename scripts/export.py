"""Export a trained classifier for other programs: images in, probabilities out.

    python scripts/export.py RUN_OR_FILE --format onnx
    python scripts/export.py RUN_OR_FILE --format onnx --half --int8 --images FOLDER
    python scripts/export.py RUN_OR_FILE --format torchscript --output classifier.pt

RUN_OR_FILE is the folder of a finished run, or a file that FewShotClassifier.save has written. Before a file is kept,
it is run on images and compared with predict.py: on those of --images, else on the run's validation images, else on
made-up ones. A difference of a probability above 1e-4 is an error. docs/EXPORT.md says what is in the file, and which
formats each method has.

Exit codes: 0 done; 2 something given was wrong; 1 the method could not be exported, or the file gives other
probabilities.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils.cli import fail, run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="RUN_OR_FILE", help="folder of a finished run, or a saved classifier")
    parser.add_argument("--format", required=True, choices=("onnx", "torchscript", "openclip", "peft"))
    parser.add_argument("--output", help="file to write; openclip, peft: a folder (default: beside or in RUN_OR_FILE)")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE_OR_FOLDER", help="images to compare with predict.py on"
    )
    parser.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="take uint8 [B, H, W, 3] of the model's size, normalize inside",
    )
    parser.add_argument("--half", action="store_true", help="onnx: also write a file in half precision")
    parser.add_argument("--int8", action="store_true", help="onnx: also write a file with int8 weights")
    parser.add_argument("--weights", help="local file of the backbone's weights (default: the run's, or the cache's)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and more of what is done")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_args(argv)
    from dassl.utils import InputError  # torch is imported only now, so that --help comes at once
    from trainers.api.export import ExportError, export_model

    try:
        report = export_model(
            args.source, args.output, format=args.format, images=args.images, half=args.half, int8=args.int8,
            with_preprocessing=args.with_preprocessing, weights=args.weights, verbose=args.debug,
        )  # fmt: skip
    except InputError as error:
        return fail(error, args.debug)
    except ExportError as error:
        fail(error, args.debug)
        return 1
    print(report)
    for path in report.files:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
