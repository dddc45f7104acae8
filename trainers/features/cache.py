"""Keep features of a frozen CLIP on disk: computed once for a list of images, then shared by all runs and trainers.

Each entry is one file, `<key>.safetensors`. It holds the features [V, N, E] and nothing else; above all, no labels. The
key is the SHA-256 of the entry's facts. The facts are everything that decides a bit of the features: weights, images,
transform, seed and number of views, precision, batch size, code, and what the arithmetic ran on. So a run reads the
very numbers that it would have computed. The file's header holds the facts, a checksum, and what people want to know
about the entry. The file's time of last change is the time of the entry's last use.

A file appears complete, by a rename; two processes that compute the same entry write the same bits. `index.json` lists
the entries; it is rewritten from the files after every change, and the program never reads it.

Legend: V views, N images, E width of the joint embedding.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on this system: the cache may then exceed its limit while two processes write
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
INDEX, LOCK = "index.json", ".lock"
GIB = 2**30
_ABANDONED = 3600  # seconds after which a half-written file is taken to belong to a process that died

Facts = Mapping[str, Any]


def default_folder() -> Path:
    """Return the folder `features` in the user's cache folder.

    The cache folder is `$DLR_CLIP_CACHE`, else `$XDG_CACHE_HOME/dlr_clip`, else `~/.cache/dlr_clip`.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("DLR_CLIP_CACHE") or os.path.join(caches, "dlr_clip")
    return Path(root).expanduser().absolute() / "features"


@dataclass(frozen=True)
class Entry:
    """One entry, a file of the cache.

    Attributes:
        path: the file.
        about: "dataset", "split" and "model", for people; empty where the header is damaged.
        facts: what decides the features, see above; empty where the header is damaged.
        size: size of the file, in bytes.
        used: time of the last use, in seconds since 1970.
    """

    path: Path
    about: Mapping[str, str]
    facts: Facts
    size: int
    used: float


class FeatureCache:
    """The entries in a folder.

    Args:
        folder: the folder; made when the first entry is saved.
        limit: bytes that all entries may take; when they take more, the least recently used are removed first.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, facts: Facts) -> Path:
        """Return the path of the entry with these facts, whether or not the entry exists."""
        return self.folder / f"{hashlib.sha256(_canonical(facts).encode()).hexdigest()}{SUFFIX}"

    def load(self, facts: Facts) -> Tensor | None:
        """Return the features [V, N, E], on the CPU; None where there is no such entry. A damaged entry is removed."""
        path = self.path(facts)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("Cached features cannot be read: %s", error)
            return None
        try:
            values = _unpack(content, facts)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning("Removed damaged features from the cache, to be computed again: %s (%s)", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # a folder that may be read only
            os.utime(path)
        return values

    def save(self, facts: Facts, values: Tensor, about: Mapping[str, str]) -> bool:
        """Keep features [V, N, E], and return whether that was possible; a failure is logged, never raised.

        Args:
            facts: what decides the features, see above.
            values: the features.
            about: "dataset", "split" and "model", for people.
        """
        values = values.detach().cpu().contiguous()
        if values.nbytes > self.limit:
            logger.info("Features are not kept: %.1f GiB, more than the cache may hold", values.nbytes / GIB)
            return False
        header = {"facts": _canonical(facts), "about": json.dumps(dict(about)), "sha256": _digest(values)}
        path = self.path(facts)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(save({"features": values}, header))
            os.replace(temporary, path)
            self._tidy()
        except OSError as error:
            logger.warning("Features are not kept: %s", error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return False
        return True

    def entries(self) -> list[Entry]:
        """Return all entries, the least recently used first."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                stat = path.stat()
                about, facts = _read_about(path)
                found.append(Entry(path, about, facts, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def clear(self) -> list[Entry]:
        """Remove all entries, and return what they were."""
        entries = self.entries()
        if self.folder.is_dir():
            with self._lock():
                for entry in entries:
                    entry.path.unlink(missing_ok=True)
                self._remove_abandoned(0)
                self._write_index([])
        return entries

    def _tidy(self) -> None:
        with self._lock():
            entries = self.entries()
            total = sum(entry.size for entry in entries)
            # The newest entry stays: `save` has checked its features against the limit (though not its header).
            while total > self.limit and len(entries) > 1:
                oldest = entries.pop(0)
                oldest.path.unlink(missing_ok=True)
                total -= oldest.size
                logger.info("Removed from the cache of features, which is full: %s", _words(oldest.about))
            self._remove_abandoned(_ABANDONED)
            self._write_index(entries)

    def _remove_abandoned(self, seconds: float) -> None:
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= seconds:
                    path.unlink()

    def _write_index(self, entries: Iterable[Entry]) -> None:
        index = {
            entry.path.name: {
                **entry.about,
                **entry.facts,
                "bytes": entry.size,
                "used": datetime.datetime.fromtimestamp(entry.used, datetime.timezone.utc).isoformat(),
            }
            for entry in entries
        }
        temporary = self.folder / f".{INDEX}.{uuid.uuid4().hex}.tmp"
        # An entry a line: json's own indent would take several times as long.
        lines = (f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in index.items())
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(temporary, self.folder / INDEX)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Let only one process at a time remove entries and write the index."""
        with open(self.folder / LOCK, "a") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also when the process is killed
            yield


def _canonical(facts: Facts) -> str:
    return json.dumps(dict(facts), sort_keys=True)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.flatten().view(torch.uint8).numpy().data).hexdigest()


def _words(about: Mapping[str, str]) -> str:
    return " ".join(about.get(name, "") for name in ("model", "dataset", "split")) or "a damaged entry"


def _header(content: bytes) -> dict[str, str]:
    # A safetensors file begins with the length of its header, in eight bytes, and the header; "__metadata__" is ours.
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _read_about(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            header = _header(start + file.read(min(length, path.stat().st_size)))
        about, facts = json.loads(header["about"]), json.loads(header["facts"])
        return dict(about), dict(facts)
    except (ValueError, KeyError, TypeError):
        return {}, {}


def _unpack(content: bytes, facts: Facts) -> Tensor:
    """Return the features in a file's content.

    Raises:
        ValueError: the content is not that of a whole file with these facts; parsers may raise other errors.
    """
    header = _header(content)
    values = load(content)["features"]
    if json.loads(header["facts"]) != json.loads(_canonical(facts)):
        raise ValueError("the features of something else")
    if header["sha256"] != _digest(values):
        raise ValueError("a wrong checksum")
    return values
