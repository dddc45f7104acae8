"""The command dlr-clip: one name for training, prediction and what is done with runs."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .places import SCRIPTS, import_ours, spoken, use_own_toolbox

HERE = Path(__file__).parent
# Module of scripts/ -> its command, where that is not the module's own name with hyphens.
SHORT = {
    "feature_cache": "cache",
    "heads_table": "heads",
    "parse_results": "parse",
    "prepare_dataset": "prepare",
    "search_params": "search",
}


def commands() -> dict[str, str]:
    """Return the commands with their modules in scripts/; `train` and `predict` have none, they are in this package."""
    modules = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "__init__")
    return {"train": "", "predict": "", **{SHORT.get(name, name.replace("_", "-")): name for name in modules}}


def figures() -> dict[str, str]:
    """Return the commands of `dlr-clip figure`, with their modules."""
    return {
        path.stem.removeprefix("plot_"): f"figures.{path.stem}" for path in sorted(SCRIPTS.glob("figures/plot_*.py"))
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dlr-clip COMMAND ...`; return the exit code."""
    use_own_toolbox()
    from dassl.utils.cli import run_main  # of our own toolbox, which is first on the path by now

    words = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _choose("dlr-clip", words, {**commands(), "figure": ""}))


def _choose(program: str, words: list[str], known: Mapping[str, str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help"):
        print(_help(program, known), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if command not in known:
        near = difflib.get_close_matches(command, known, 1)
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        print(f'error: Expected a command of {program} ({", ".join(known)}) but got "{command}"{hint}', file=sys.stderr)
        return 2
    if program == "dlr-clip" and command == "figure":
        return _choose("dlr-clip figure", rest, figures())
    sys.argv = [f"{program} {command}", *rest]  # messages about this process's command line use this name
    module = known[command]
    run: Any = import_ours(f"scripts.{module}" if module else f"dlr_clip_cli.{command}")
    if not module:
        return int(run.main(rest))
    files = {f"scripts/{module.replace('.', '/')}.py": f"{program} {command}", "train.py": spoken("train")}
    for file, name in files.items():  # the help calls commands by the names that they have here
        run.__doc__ = (run.__doc__ or "").replace(f"python {file}", name)
    return int(run.main(rest))


def _help(program: str, known: Mapping[str, str]) -> str:
    width = max(map(len, known))
    lines = [f"usage: {program} COMMAND ... (--help after a command tells its flags)", ""]
    return "\n".join([*lines, *(f"  {name:<{width}}  {_purpose(name, module)}" for name, module in known.items())])


def _purpose(command: str, module: str) -> str:
    """Return the first line of a command's documentation; its module is not imported."""
    if command == "figure":
        return f"Draw a figure of finished runs: {', '.join(figures())}."
    path = SCRIPTS.joinpath(*module.split(".")).with_suffix(".py") if module else HERE / f"{command}.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
