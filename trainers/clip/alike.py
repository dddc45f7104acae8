"""Find the classes that CLIP cannot tell apart by their names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import open_clip
import torch
from torch import Tensor

from .model import CLIP
from .templates import clean_classname

logger = logging.getLogger(__name__)

# Equal texts have a cosine of 1 but for rounding (1e-6, also in half precision). Names that are only near in meaning
# are further apart: the bundled CLIP's rhombus and kite have 0.9995.
CLOSE = 0.9999
SHOWN = 10  # groups, and words, that a warning names
_ROWS = 1024  # classes compared with all others at once: bounds memory at thousands of classes


def alike_classes(texts: Tensor, close: float | None = None) -> list[list[int]]:
    """Group the classes whose text features are equal or nearly so.

    Args:
        texts: normalized text features [C, E].
        close: cosine from which a class joins the group of the first class that it is this close to; default: `CLOSE`.

    Returns:
        The groups of two or more classes, as labels in ascending order.
    """
    bound = CLOSE if close is None else close
    texts = texts.float()
    groups: list[list[int]] = []
    taken: set[int] = set()
    for start in range(0, len(texts), _ROWS):
        near = (texts[start : start + _ROWS] @ texts.t() >= bound).cpu()
        for label, row in enumerate(near, start):
            if label in taken:
                continue
            group = [other for other in row.nonzero().flatten().tolist() if other > label and other not in taken]
            taken.update(group)
            if group:
                groups.append([label, *group])
    return groups


def unknown_words(clip: CLIP, classnames: Sequence[str]) -> list[str]:
    """Return the words of the class names that the backbone has no embedding for, each once; see `CLIP.known_ids`."""
    if clip.known_ids is None:
        return []
    words = list(dict.fromkeys(word for name in classnames for word in clean_classname(name).split()))
    if not words:
        return []
    tokens = open_clip.tokenize(words, context_length=clip.text.context_length)
    known = torch.tensor(sorted(clip.known_ids))
    seen = (torch.isin(tokens, known) | (tokens == 0)).all(dim=1)
    return [word for word, is_known in zip(words, seen.tolist(), strict=True) if not is_known]


def tell_alike(clip: CLIP, classnames: Sequence[str], texts: Tensor) -> None:
    """Warn of classes that CLIP cannot tell apart by their names, and of words that the backbone does not know.

    Args:
        classnames: C names as the dataset spells them.
        texts: their normalized text features [C, E].
    """
    groups = alike_classes(texts)
    if groups:
        logger.warning(
            "CLIP can hardly tell these classes apart by their names (cosine of their texts at least %s): %s. "
            "Zero-shot CLIP, and a method that starts from texts, guesses among them: give them names that say more",
            CLOSE,
            _some(["{" + ", ".join(classnames[label] for label in group) + "}" for group in groups], "groups"),
        )
    words = unknown_words(clip, classnames)
    if words:
        logger.warning(
            'The backbone "%s" does not know these words of the class names, and reads all of them as the same: %s',
            clip.name,
            _some(words, "words"),
        )


def _some(texts: Sequence[str], what: str) -> str:
    rest = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {rest} more {what}" if rest > 0 else "")
