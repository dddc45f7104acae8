"""Describe classes by sentences of their own, in CuPL's layout: a JSON file {class name: [sentence, ...]}.

Pratt et al., What does a platypus look like? Generating customized prompts for zero-shot image classification, 2023.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Prompts(list[str]):
    """The prompt templates of a run, with the sentences of each class where DATASET.DESCRIPTIONS gives them.

    As a list it is the templates: methods that write prompts of their own, and train with them, take these.

    Args:
        templates: each with one ``{}``.
        sentences: class name -> its sentences; empty: the templates describe the classes.
        source: where the sentences come from, for messages.
    """

    def __init__(
        self, templates: Iterable[str], sentences: Mapping[str, Sequence[str]] | None = None, source: str = ""
    ) -> None:
        super().__init__(templates)
        self.sentences = {name: list(texts) for name, texts in (sentences or {}).items()}
        self.source = source

    def __str__(self) -> str:
        return f"the sentences of {self.source}" if self.sentences else " | ".join(self)


def read_descriptions(path: str) -> dict[str, list[str]]:
    """Read the sentences of each class from a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in CuPL's layout; the message says where.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"Expected DATASET.DESCRIPTIONS to be a JSON file but there is none at {path}")
    layout = f"Expected {path} to be JSON of the form {{class name: [sentence, ...]}}"
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{layout} but got: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{layout} but got {'nothing' if found == {} else type(found).__name__}")
    for name, texts in found.items():
        good = isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        if not good:
            raise ValueError(f"{layout}, with at least one sentence and no empty one, but {name!r} has {texts!r:.80}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ValueError(f"the class {twice!r} stands there twice")
    return dict(pairs)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(_plain(name), {_plain(other): other for other in known}, 1)
    return f' (it has "{next(other for other in known if _plain(other) == close[0])}")' if close else ""


def sentences_of(prompts: Sequence[str], classnames: Sequence[str]) -> list[list[str]]:
    """Return the sentences of each class, where there are such; else an empty list.

    A class is found by its name, or by its name without regard to case, underscores and spaces.

    Raises:
        ValueError: a class has no sentences; the message names the nearest one that has.
    """
    if not isinstance(prompts, Prompts) or not prompts.sentences:
        return []
    loose: dict[str, list[str]] = {}
    for name, texts in prompts.sentences.items():
        loose.setdefault(_plain(name), texts)
    found = {name: prompts.sentences.get(name) or loose.get(_plain(name)) for name in classnames}
    missing = [name for name, texts in found.items() if texts is None]
    if missing:
        hints = [f"{name!r}{_nearest(name, prompts.sentences)}" for name in missing[:3]]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"Expected {prompts.source or 'DATASET.DESCRIPTIONS'} to describe every class but it lacks "
            f"{', '.join(hints)}{more}"
        )
    return [found[name] or [] for name in classnames]
