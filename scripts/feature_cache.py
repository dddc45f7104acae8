"""Show or clear the features of images that runs keep on disk.

    python scripts/feature_cache.py show
    python scripts/feature_cache.py clear

They lie in the folder `features` of `$DLR_CLIP_CACHE`, else of `$XDG_CACHE_HOME/dlr_clip`, else of `~/.cache/dlr_clip`;
runs with another FEATURE_CACHE.DIR keep theirs there: see --folder. Clearing while runs go on is safe.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils.cli import run_main
from trainers.features.cache import Entry, FeatureCache, default_folder

MIB = 2**20


def table(entries: Iterable[Entry]) -> str:
    """Return a table with a row per entry, the one used last on top; "?" stands where a header is damaged."""
    rows = []
    for entry in reversed(list(entries)):
        shape = entry.facts.get("shape", ("?", "?", "?"))
        used = datetime.datetime.fromtimestamp(entry.used).isoformat(" ", timespec="minutes")
        words = [entry.about.get(name, "?") for name in ("dataset", "split", "model")]
        seed = entry.facts.get("seed", "") if "views" in entry.facts else ""
        rows.append(
            [*words, entry.facts.get("precision", "?"), shape[1], shape[0], seed, f"{entry.size / MIB:.1f}", used]
        )
    headers = ["dataset", "split", "model", "precision", "images", "views", "seed", "MiB", "last use"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left",) * 4 + ("right",) * 4 + ("left",))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("show", "clear"))
    parser.add_argument("--folder", type=Path, help="folder of the cache (default: see above)")
    args = parser.parse_args(argv)
    cache = FeatureCache(args.folder or default_folder(), limit=0)
    entries = cache.entries() if args.command == "show" else cache.clear()
    total = f"{len(entries)} entries, {sum(entry.size for entry in entries) / MIB:.1f} MiB"
    if args.command == "show" and entries:
        print(table(entries))
    print(f"{'Removed' if args.command == 'clear' else 'Holds'} {total}: {cache.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
