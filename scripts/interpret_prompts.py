"""The words of CLIP's vocabulary that lie nearest to learnt context vectors, for a run of CoOp or a successor.

    python scripts/interpret_prompts.py output/digits/CoOp/tiny_16shots/seed1

One row per vector: the nearest tokens by Euclidean distance of their embeddings, with the distance, as CoOp's own
script finds them. Vectors need not lie near any word: compare with the distance to the words that a context started as.
Where each class has a context of its own (CSC), --classes says whose are shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from tabulate import tabulate
from torch import Tensor

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils import InputError
from dassl.utils.cli import SETUP_ERRORS, fail, given_wrongly, run_main
from trainers.app.prediction import load_trainer

WORD_END = "</w>"  # how the vocabulary marks a token that ends a word


def nearest_tokens(
    context: Tensor, embeddings: Tensor, top_k: int, known: Collection[int] | None = None
) -> list[list[tuple[int, float]]]:
    """Return, for each vector, the ids of the nearest tokens with their distances, the nearest first.

    Args:
        context: vectors [n, D].
        embeddings: of all tokens [V, D].
        top_k: how many tokens.
        known: the ids to choose from; None: all.
    """
    ids = torch.arange(len(embeddings)) if known is None else torch.tensor(sorted(known))
    distances = torch.cdist(context.float().cpu(), embeddings.float().cpu()[ids])  # [n, ids]
    found = distances.topk(min(top_k, len(ids)), dim=1, largest=False)
    return [
        [(int(ids[i]), float(d)) for i, d in zip(row, values, strict=True)]
        for row, values in zip(found.indices, found.values, strict=True)
    ]


def spelled(token: int) -> str:
    """Return a token as text; a part of a word has a hyphen at its end."""
    text = open_clip.tokenizer._tokenizer.decoder[token]
    return text.removesuffix(WORD_END) if text.endswith(WORD_END) else f"{text}-"


def contexts(trainer: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the context vectors [n, D] of a trainer's prompts: under "", or by class where each has its own.

    Raises:
        InputError: the method learns no context.
    """
    context = getattr(getattr(trainer.network, "learner", None), "ctx", None)
    if not isinstance(context, Tensor):
        raise InputError(f"Expected a run of a prompt method but got one of {type(trainer).__name__}")
    context = context.detach()
    return {"": context} if context.ndim == 2 else dict(zip(names, context, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir", help="output folder of a run")
    parser.add_argument("--top-k", type=int, default=5, help="words per vector (5)")
    parser.add_argument(
        "--load-epoch", type=int, help="the checkpoint after that many epochs; else the best or last one"
    )
    parser.add_argument("--classes", help='with a context of each class: whose, as "a,b"')
    args = parser.parse_args(argv, argparse.Namespace(cpu=True, debug=False, set=[], batch_size=None))
    try:
        if args.top_k < 1:
            raise InputError(f"Expected --top-k to be at least 1 but got {args.top_k}")
        trainer, names = load_trainer(args)
        clip = trainer.network.clip
        for name, context in contexts(trainer, names).items():
            nearest = nearest_tokens(context, clip.text.token_embedding.weight, args.top_k, clip.known_ids)
            rows = [
                [number, *(f"{spelled(token)} {distance:.4f}" for token, distance in row)]
                for number, row in enumerate(nearest, start=1)
            ]
            if name:
                print(f"\n{name}\n")
            print(tabulate(rows, ["vector", *range(1, len(rows[0]))], tablefmt="pipe", disable_numparse=True))
    except SETUP_ERRORS as error:
        if given_wrongly(error):
            return fail(error)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
