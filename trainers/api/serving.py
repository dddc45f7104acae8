"""Answer what is on photos for a local page, and keep corrections for the next training. No web code is here.

Legend: B photos, C classes.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.utils import InputError
from dassl.utils.files import file_digest
from dassl.utils.packages import needed_package

from ..app.prediction import Model, infer, main_head, read_batches
from ..clip import zeroshot_weights

ZERO_SHOT = "zero-shot CLIP"  # the head that classifies into any names
SHOWN = 5  # classes of each photo
COLORS = ("#7bc9ab", "#c8ccd4")  # of the best class, and of the others


class Answer(NamedTuple):
    """Hold the answer for one photo.

    Attributes:
        path: of the file.
        guesses: the best classes with their probabilities, the best first; empty where the photo cannot be read.
        unknown: whether no class is probable enough.
        problem: why the photo cannot be read; "": it can.
    """

    path: str
    guesses: list[tuple[str, float]]
    unknown: bool = False
    problem: str = ""


class PhotoServer:
    """Answer questions about photos, one at a time.

    Args:
        model: a loaded model.
        corrections: the folder that corrected photos are copied into, one folder for each class.
    """

    def __init__(self, model: Model, corrections: str | os.PathLike[str]) -> None:
        self.model = model
        self.corrections = Path(corrections).expanduser().absolute()
        self._lock = threading.Lock()  # a page may ask twice at the same time
        self._texts: tuple[tuple[str, ...], Tensor] | None = None
        size = model.trainer.cfg.INPUT.SIZE
        with torch.no_grad():
            heads = infer(model.trainer, torch.zeros(1, 3, *size, device=model.trainer.device), [""])
        main = main_head(model.trainer, heads)
        self.heads = [main, *(name for name in heads if name != main), ZERO_SHOT]

    @torch.no_grad()
    def answer(self, paths: Sequence[str], head: str = "", names: Sequence[str] = ()) -> list[Answer]:
        """Return the answers for photos, in their order.

        Args:
            paths: of the files.
            head: which of the method's classifiers; "": the main one.
            names: further class names; with any, zero-shot CLIP answers.

        Raises:
            InputError: there is no such head.
        """
        head = ZERO_SHOT if names else head or self.heads[0]
        if head not in self.heads:
            raise InputError(f"Expected the head to be one of {', '.join(self.heads)} but got {head!r}")
        trainer, found = self.model.trainer, {}
        classes = [*self.model.names, *(name for name in names if name not in self.model.names)]
        with self._lock:
            for good, bad in read_batches(trainer, list(paths), bar=False):
                found.update({number: Answer(paths[number], [], problem=reason) for number, reason in bad.items()})
                if not good:
                    continue
                images = torch.stack([image for _, image in good]).to(trainer.device)
                rows = self._probabilities(images, [paths[number] for number, _ in good], head, classes)
                for (number, _), row in zip(good, rows, strict=True):
                    found[number] = self._answer(paths[number], row, classes, head)
        return [found[number] for number in range(len(paths))]

    def _probabilities(self, images: Tensor, paths: Sequence[str], head: str, classes: Sequence[str]) -> Tensor:
        trainer = self.model.trainer
        if head != ZERO_SHOT:
            heads: Mapping[str, Tensor] = infer(trainer, images, paths)
            scale = self.model.temperature if head == self.heads[0] else 1.0
            return (heads[head].float() / scale).softmax(dim=1).cpu()
        clip = trainer.network.clip
        if self._texts is None or self._texts[0] != tuple(classes):
            self._texts = tuple(classes), zeroshot_weights(clip, classes, list(trainer.templates())).float()
        with trainer.precision.autocast():
            features = F.normalize(clip.encode_image(images).float(), dim=-1)
        return (clip.logit_scale * features @ self._texts[1].t()).softmax(dim=1).cpu()

    def _answer(self, path: str, row: Tensor, classes: Sequence[str], head: str) -> Answer:
        values, places = row.sort(descending=True, stable=True)
        guesses = [(classes[c], float(p)) for p, c in zip(values[:SHOWN], places[:SHOWN].tolist(), strict=True)]
        least = self.model.threshold if head == self.heads[0] else None
        return Answer(path, guesses, least is not None and guesses[0][1] < least)

    def correct(self, path: str, name: str) -> Path:
        """Copy a photo into the folder of its right class, and return the copy's path.

        The folder of corrections has the layout that `train.py --root` reads. A photo that is there already is not
        copied again.

        Raises:
            InputError: the name is none, or the photo cannot be copied.
        """
        folder = re.sub(r"[/\\\0]", "_", name).strip().lstrip(".")
        if not folder:
            raise InputError(f"Expected the name of a class but got {name!r}")
        source = Path(path)
        target = self.corrections / folder / f"{source.stem}-{file_digest(source)[:8]}{source.suffix}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(source, target)
        except OSError as error:
            raise InputError(f"Expected to copy the photo to {target} but got: {error.strerror or error}") from error
        return target


def answers_html(answers: Sequence[Answer], names: Mapping[str, str]) -> str:
    """Return answers as HTML: for each photo its name, and its best classes as bars.

    Args:
        names: path -> name to show.
    """
    parts = []
    for one in answers:
        name = f"<b>{escape(names.get(one.path, one.path))}</b>"
        if one.problem:
            parts.append(f"<div class='photo'>{name}<p>{escape(one.problem)}</p></div>")
            continue
        head = " <i>none of the classes</i>" if one.unknown else ""
        bars = "".join(
            f"<div class='bar'><span style='width:{100 * p:.1f}%;background:{COLORS[place > 0]}'></span>"
            f"<label>{escape(label)}</label><em>{100 * p:.1f} %</em></div>"
            for place, (label, p) in enumerate(one.guesses)
        )
        parts.append(f"<div class='photo'>{name}{head}{bars}</div>")
    return "".join(parts) or "<p>Drop photos to see what they are.</p>"


def names_in(text: str) -> list[str]:
    """Return the class names in a text, which commas or lines separate, each once."""
    return list(dict.fromkeys(name for part in re.split(r"[,\n]", text or "") if (name := part.strip())))


def require_gradio() -> Any:
    """Return the module gradio.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    return needed_package("gradio", "the page", "serve")
