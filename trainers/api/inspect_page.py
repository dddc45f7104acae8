"""Show what is wrong with photos as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from dassl.utils import InputError, read_image

from .inspection import TEST, TRAINING, Doubt, Findings, Photo, Twins

THUMB = 128  # pixels: the longer side of a thumbnail
SHOWN = 48  # photos, or pairs of photos, of a section
CSS = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 0.6rem 0 1.2rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
.sheet { display: flex; flex-wrap: wrap; gap: 0.8rem; }
figure { margin: 0; width: 8.6rem; } figure.pair { width: 17.6rem; }
figure img { height: 8rem; max-width: 8.6rem; object-fit: contain; background: #eee; }
figcaption { font-size: 13px; overflow-wrap: anywhere; } figcaption small { color: #555; }
.loud { background: #fde8e8; border-left: 4px solid #c0392b; padding: 0.6rem 1rem; }
.fine { color: #555; }
"""


def _picture(path: str) -> str:
    """Return an image element with a thumbnail inside; a photo that cannot be read has none."""
    try:
        image = read_image(path)
    except InputError:
        return ""
    image.thumbnail((THUMB, THUMB))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f"<img alt='' src='data:image/jpeg;base64,{data}'>"


def _place(photo: Photo) -> str:
    path = Path(photo.path)
    return escape(str(Path(path.parent.name, path.name)))


class Page:
    """Write the page.

    Args:
        found: what is wrong.
        title: the head line.
    """

    def __init__(self, found: Findings, title: str) -> None:
        self.found = found
        self.title = title
        self.names = [escape(name) for name in found.names]

    def html(self) -> str:
        """Return the page."""
        found = self.found
        leaks = len(found.leaks)
        loud = (
            f"<p class='loud'><b>Among the training photos are copies of test photos: {leaks}.</b> The "
            "accuracy on the test photos is too good to be true until they are taken out.</p>\n"
            if leaks
            else ""
        )
        right = found.judged - len(found.mistakes)
        share = f"{100 * right / found.judged:.1f} % of {found.judged} photos" if found.judged else "no photo"
        parts = [
            "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
            f"<title>{escape(self.title)}</title><meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<link rel='icon' href='data:,'><style>{CSS}</style></head><body>\n<h1>{escape(self.title)}</h1>\n",
            loud,
            self._summary(),
            f"<h2>Surest mistakes</h2>\n<p>The classifier is right on {share} that it did not learn from. Where the "
            "photo is of the class that it answers, the photo is in the wrong folder.</p>\n",
            self._sheet(found.mistakes, lambda one: self._doubt(one, "taken for")),
            "<h2>Doubtful labels</h2>\n<p>Zero-shot CLIP and the most similar other photos speak against the label, "
            "and for another class. The share says how strongly.</p>\n",
            self._sheet(found.doubts, lambda one: self._doubt(one, "looks like")),
            "<h2>Near-duplicates</h2>\n<p>Pairs that show the same picture: those between training and test first.",
            "</p>\n",
            self._sheet(found.twins, self._pair),
            "<h2>Classes that are confused</h2>\n",
            self._confused(),
            "<h2>Files that cannot be read</h2>\n",
            self._rows(("file", "why"), [(path, reason) for path, reason in found.broken.items()]),
            "<h2>Tiny photos</h2>\n<p>A side is shorter than half of what the model sees.</p>\n",
            self._rows(("file", "size"), [(path, f"{w} x {h}") for path, (w, h) in found.tiny.items()]),
            "</body></html>\n",
        ]
        return "".join(parts)

    def _summary(self) -> str:
        rows = [
            (name, *(str(self.found.counts[part][label]) for part in (TRAINING, TEST)))
            for label, name in enumerate(self.found.names)
        ]
        return self._rows(("class", "training photos", "test photos"), rows)

    def _confused(self) -> str:
        pairs = self.found.confused.most_common(SHOWN)
        return self._rows(
            ("class", "taken for", "photos"),
            [(self.found.names[true], self.found.names[answer], str(count)) for (true, answer), count in pairs],
        )

    @staticmethod
    def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        if not rows:
            return "<p class='fine'>None.</p>\n"
        cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
        return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>\n{cells}</table>\n"

    @staticmethod
    def _sheet(items: Sequence[Doubt] | Sequence[Twins], draw: Callable[..., str]) -> str:
        if not items:
            return "<p class='fine'>None.</p>\n"
        more = f"<p class='fine'>and {len(items) - SHOWN} more</p>\n" if len(items) > SHOWN else ""
        return f"<div class='sheet'>{''.join(map(draw, items[:SHOWN]))}</div>\n{more}"

    def _doubt(self, one: Doubt, verb: str) -> str:
        own, other = self.names[one.photo.label], self.names[one.other]
        return (
            f"<figure>{_picture(one.photo.path)}<figcaption><b>{own}</b>, {verb} {other} ({100 * one.score:.0f} %)<br>"
            f"<small>{_place(one.photo)}, {one.photo.part}</small></figcaption></figure>"
        )

    def _pair(self, pair: Twins) -> str:
        labels = [self.names[photo.label] for photo in (pair.first, pair.second)]
        said = f"both {labels[0]}" if not pair.disagrees else f"<b>{labels[0]} and {labels[1]}</b>"
        parts = f"{pair.first.part} and {pair.second.part}"
        parts = f"<b>{parts}</b>" if pair.leaks else parts
        return (
            f"<figure class='pair'>{_picture(pair.first.path)} {_picture(pair.second.path)}<figcaption>{said}, "
            f"{parts}<br><small>{_place(pair.first)}, {_place(pair.second)}</small>"
            "</figcaption></figure>"
        )
