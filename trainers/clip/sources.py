"""Fetch a backbone's weights from a URL with a checksum, or from a repository of the Hugging Face hub.

Neither is contacted if the file already lies in the cache. A download goes to a temporary name and takes its real
name only when it is complete and its checksum is right.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import huggingface_hub
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained_from_hf
from tqdm import tqdm

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20  # bytes read at once
_TIMEOUT = 30  # seconds without an answer while downloading
_OFFLINE = "network access is switched off (HF_HUB_OFFLINE)"
_PROBE_TIMEOUT = 5  # seconds to wait when only asking whether a download would be possible


class Source(Protocol):
    """One place that offers a backbone's weights."""

    def cached(self) -> Path | None:
        """Return the file if it is already on this machine, else None."""

    def reachable(self) -> bool:
        """Tell whether the place answers; this is cheap and downloads nothing."""

    def fetch(self) -> Path:
        """Return the file, downloaded if need be.

        Raises:
            OSError: the file cannot be had.
            ValueError: the file's checksum is wrong.
        """

    def describe(self) -> str:
        """Say what to fetch by hand, its checksum, and where to put it."""


def cache_folders() -> list[Path]:
    """List the folders searched for downloaded weights; the first is the one written to.

    ``$DLR_CLIP_CACHE/clip`` comes first if that variable is set; then ``~/.cache/clip``, which other CLIP programs
    use too.
    """
    own = os.environ.get("DLR_CLIP_CACHE")
    return [*([Path(own).expanduser() / "clip"] if own else []), Path.home() / ".cache" / "clip"]


def offline() -> bool:
    """Tell whether the user forbids network access (HF_HUB_OFFLINE, the hub library's own switch)."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def _answers(url: str) -> bool:
    if offline():
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_TIMEOUT):
            return True
    except (OSError, ValueError):
        return False


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class UrlSource:
    """A file at a URL.

    Attributes:
        url: where the file is.
        sha256: the file's checksum or the beginning of it; "" if none is published.
    """

    url: str
    sha256: str

    @classmethod
    def from_url(cls, url: str) -> UrlSource:
        """Build a source from a URL, and take the checksum from the URL.

        The checksum is a path component (OpenAI) or the end of the file's stem (open_clip); "" if there is none.
        """
        found = re.search(r"/([0-9a-f]{64})/", url) or re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
        return cls(url, found.group(1) if found else "")

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def cached(self) -> Path | None:
        candidates = [folder / self.filename for folder in cache_folders()]
        return next((path for path in candidates if path.is_file()), None)

    def reachable(self) -> bool:
        return _answers(self.url)

    def fetch(self) -> Path:
        path = self.cached()
        if path is not None:
            if file_digest(path).startswith(self.sha256):
                return path
            logger.warning("%s has not the checksum %s...: fetching it again", path, self.sha256[:8])
        if offline():
            raise OSError(_OFFLINE)
        target = cache_folders()[0] / self.filename
        download(self.url, target, self.sha256)
        return target

    def describe(self) -> str:
        checksum = f"sha256 {self.sha256}" if self.sha256 else "no checksum is published"
        return f"{self.url} ({checksum}) as {cache_folders()[0] / self.filename}"


@dataclass(frozen=True)
class HubSource:
    """A model repository on the Hugging Face hub.

    Attributes:
        repo: its name, with the owner's.
        files: the file in it, under all names that will do, the preferred ones first.
    """

    repo: str
    files: tuple[str, ...] = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)

    def cached(self) -> Path | None:
        for name in self.files:
            found = huggingface_hub.try_to_load_from_cache(self.repo, name)
            if isinstance(found, str):
                return Path(found)
        return None

    def reachable(self) -> bool:
        return any(_answers(huggingface_hub.hf_hub_url(self.repo, name)) for name in self.files)

    def fetch(self) -> Path:
        path = self.cached()
        if path is None and offline():
            raise OSError(_OFFLINE)
        if path is None and not self.reachable():  # the hub library would keep trying for most of a minute
            raise OSError(f"no answer for {self.repo} on the Hugging Face hub")
        return path or Path(download_pretrained_from_hf(self.repo, self.files[-1]))

    def describe(self) -> str:
        url = huggingface_hub.hf_hub_url(self.repo, self.files[0])
        return f"{url} (its sha256 stands on its page there)"


def download(url: str, target: Path, sha256: str) -> None:
    """Download ``url`` to ``target`` by way of a temporary file in the same folder.

    Args:
        url: where the file is.
        target: the file to write; its folder is created if missing.
        sha256: the expected checksum or the beginning of it; "" accepts any.

    Raises:
        OSError: there is no connection, or the connection broke off.
        ValueError: the checksum is not the expected one; nothing is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    part = Path(name)
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=target.name) as bar:
                while block := response.read(_BLOCK):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
            if total and file.tell() != total:
                raise OSError(f"the connection broke off after {file.tell()} of {total} bytes")
            file.flush()
            os.fsync(file.fileno())
        if not digest.hexdigest().startswith(sha256):
            raise ValueError(f"Expected {url} to have sha256 {sha256} but got {digest.hexdigest()}: not kept")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
