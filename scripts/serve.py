"""Open a local page to drop photos on: their best classes, other heads, names of your own, corrections.

    python scripts/serve.py RUN_OR_FILE [--port 7860] [--corrections corrections] [--cpu]

RUN_OR_FILE is the output folder of a run, or a file that FewShotClassifier.save has written. The page is at
http://127.0.0.1:7860, for this machine only. A corrected photo is copied into a folder of its class below
--corrections, which `train.py --root` reads. It needs gradio: pip install 'dlr-clip[serve]'. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils.cli import SETUP_ERRORS, fail, given_wrongly, run_main
from trainers.api.serve_page import build_page, launch
from trainers.api.serving import PhotoServer, require_gradio
from trainers.app.prediction import load_model, model_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_FILE", help="output folder of a run, or a saved classifier")
    parser.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860 on)")
    parser.add_argument(
        "--corrections", default="corrections", help="folder for corrected photos (default: corrections)"
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    args = parser.parse_args(argv)
    try:
        require_gradio()
        server = PhotoServer(load_model(model_arguments(args.model, args.cpu)), args.corrections)
        page = build_page(server, f"{server.model.trainer.cfg.TRAINER.NAME}: {Path(args.model).name}")
        _, address, _ = launch(page, args.port, block=False)
    except SETUP_ERRORS as error:
        if given_wrongly(error):
            return fail(error)
        raise
    print(f"{address} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
