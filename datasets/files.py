"""List folders and read annotation files: sorted, without hidden entries, with errors that name the fault."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dassl.utils import InputError

IMAGE_EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2"),
    )
)
# Folders that systems and network drives put beside people's files (thumbnails, trash, recovered files), lower case.
# Those whose names start with a dot (.AppleDouble, .thumbnails, .Trash) are left out with all hidden entries.
JUNK_FOLDERS = frozenset(
    (
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp"),  # Synology, QNAP
        *("$recycle.bin", "recycler", "system volume information", "found.000"),  # Windows
        *("__macosx", "lost+found", "__pycache__"),
    )
)


def list_folders(folder: str | Path) -> list[str]:
    """List the sub-folders' names, sorted; files, hidden folders and JUNK_FOLDERS are left out.

    Raises:
        InputError: `folder` cannot be listed, a name is not UTF-8, or an entry is a broken link or a loop of links
            (without that entry, the classes after it would get other labels). A broken link that is called like an
            image counts as an image.
    """
    return sorted(e.name for e in _entries(folder) if e.name.lower() not in JUNK_FOLDERS and _is_folder(e))


def list_images(folder: str | Path) -> list[str]:
    """List the names of the image files (by extension) directly in a folder, sorted; links to folders are left out."""
    return sorted(entry.name for entry in _entries(folder) if is_image_name(entry.name) and not entry.is_dir())


def list_images_below(folder: str | Path, others: Counter[str] | None = None) -> list[str]:
    """List the images in a folder and in its sub-folders, linked ones too, as paths relative to it, with "/".

    Each folder's own images come first, sorted, then its sub-folders in their order.

    Args:
        others: filled with the number of files of other kinds by extension, lower case; hidden files do not count.

    Raises:
        InputError: as `list_folders`, or links that lead around in a circle.
    """
    return list(walk_images(folder, others))


def walk_images(folder: str | Path, others: Counter[str] | None = None) -> Iterator[str]:
    """Yield what `list_images_below` returns, folder by folder, so that no list of all of them is in memory."""
    return _images_below(str(folder), Counter() if others is None else others, ())


def holds_images(folder: str | Path) -> bool:
    """Return whether there is an image in a folder or below it; the search ends with the first.

    Raises:
        InputError: as `list_images_below`, met on the way.
    """
    return next(_images_below(str(folder), Counter(), ()), None) is not None


def _images_below(folder: str, others: Counter[str], above: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        raise InputError(f"Expected folders without loops but the link {folder} leads back to {real}, which holds it")
    yield from list_images(folder)
    for name in list_folders(folder):
        yield from (f"{name}/{path}" for path in _images_below(f"{folder}/{name}", others, (*above, real)))
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not (entry.name.startswith(".") or entry.is_dir())]
    others.update(os.path.splitext(name)[1].lower() for name in names if not is_image_name(name))


def tell_kinds(others: Counter[str]) -> str:
    """Tell the commonest extensions of files that are no images: ".heic (3), no extension (1)"; "" for none."""
    kinds = ", ".join(f"{suffix or 'no extension'} ({count})" for suffix, count in others.most_common(5))
    return f"{kinds}; convert .heic to JPEG first" if {".heic", ".heif"} & set(others) else kinds


def is_image_name(name: str) -> bool:
    """Return whether a file of this name is taken for an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    check_name(entry.name, str(folder))
                    yield entry
    except OSError as error:
        raise InputError(f"Expected {folder} to be a readable folder but got: {error.strerror or error}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        try:
            os.stat(entry.path)
        except OSError as error:
            if is_image_name(entry.name):
                return False
            raise InputError(
                f"Expected the link {entry.path} to lead to a folder but got: {error.strerror or error}"
            ) from error
    return entry.is_dir()


def check_name(name: str, where: str) -> None:
    """Refuse a name that is not UTF-8: it could stand neither in a split file nor in a log."""
    if not name.isascii():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raw = os.fsencode(name) if os.name == "posix" else name
            raise InputError(f"Expected the names in {where} to be UTF-8 but got {raw!r}: rename it") from None


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a UTF-8 text file, stripped, without the empty ones.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8 or has no line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"Expected {path} to be a readable text file but got: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"Expected {path} to be UTF-8 text but got: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"Expected {path} to have lines of text but it is empty")
    return lines


def read_mat(path: str | Path, name: str) -> Any:
    """Read the variable `name` of a MATLAB file (format 5, as the official annotations have), as scipy gives it.

    Raises:
        InputError: the file is missing, is not a MATLAB file, or has no such variable.
    """
    from scipy.io import loadmat  # here, not above: slow to import, and needed by two readers only

    try:
        content = loadmat(str(path), appendmat=False)
    except Exception as error:  # a damaged file can raise nearly anything
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Expected {path} to be a readable MATLAB file but got: {reason}") from error
    if name not in content:
        found = ", ".join(key for key in content if not key.startswith("__"))
        raise InputError(f"Expected {path} to hold the variable {name} but got {found or 'none'}")
    return content[name]


def read_table(path: str | Path, *types: type[str] | type[int]) -> list[list[Any]]:
    """Read the lines of a text file as fields between spaces; the last field keeps its inner spaces.

    Lines that start with `#` are left out.

    Args:
        types: one per field, str or int.

    Raises:
        InputError: as `read_lines`, or a line has too few fields or no number where one should be.
    """
    rows = []
    for line in read_lines(path):
        if line.startswith("#"):
            continue
        fields = line.split(maxsplit=len(types) - 1)
        try:
            rows.append([kind(field) for kind, field in zip(types, fields, strict=True)])
        except ValueError:
            form = " ".join({str: "text", int: "number"}[kind] for kind in types)
            raise InputError(f"Expected the lines of {path} to be '{form}' but got {line!r}") from None
    return rows
