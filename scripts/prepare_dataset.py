"""Check a benchmark's folder, unpack the archives that lie there, and say what is missing and where it is to be had.

    python scripts/prepare_dataset.py EuroSAT --root ~/data

Put the archives that you have downloaded into --root, into the dataset's folder in it, or into --archives. Nothing is
downloaded unless --download is given; a download that was cut short is resumed. At the end the dataset is read as
training reads it, and its classes and images are counted.

Exit codes: 0 complete; 1 something is missing or the counts differ; 2 something given was wrong.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.utils import InputError, did_you_mean
from dassl.utils.cli import run_main
from scripts.lib.dataset_sources import SOURCES, Download, Part, counts_of
from trainers.app.data import datasets, files

logger = logging.getLogger("prepare_dataset")

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"  # holds the labels of ImageNet's validation images
CHUNK = 1 << 20  # bytes


# --------------------------------------------------------------------------------------------------- what is there


def is_there(folder: Path, part: Part) -> bool:
    """Return whether all that the part gives exists, and its folders are not empty."""
    return all(
        any(path.iterdir()) if path.is_dir() else path.is_file() for path in (folder / name for name in part.gives)
    )


def find_download(part: Part, places: Sequence[Path]) -> tuple[Download, Path] | None:
    """Return the first of the part's downloads that lies in one of `places`, with its path; None: none does."""
    for download in part.downloads:
        for place in places:
            path = place / download.file
            if path.is_file():
                return download, path
    return None


def has_split(name: str, folder: Path) -> bool:
    split_name = getattr(DATASET_REGISTRY.get(name), "split_name", "")
    return bool(split_name) and (folder / split_name).is_file()


# --------------------------------------------------------------------------------------------------- unpacking


def extract(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive; nothing is written outside `folder`.

    Raises:
        InputError: the archive is damaged or of another kind.
    """
    logger.info(f"Unpacking {archive}")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folder)
        elif tarfile.is_tarfile(archive):
            if not hasattr(tarfile, "data_filter"):  # Python 3.10 before 3.10.12
                raise InputError(f"Expected a Python that unpacks safely but got an old one: unpack {archive} by hand")
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        else:
            raise InputError(f"Expected {archive} to be a zip or tar archive but it is neither: download it again")
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"Expected {archive} to be a sound archive but got: {error}") from error


def put_in_place(download: Download, file: Path, folder: Path, places: Sequence[Path]) -> None:
    """Bring a downloaded file's content to where the reader looks for it, wholly or not at all.

    Raises:
        InputError: the archive is damaged, or lacks what it should hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not download.moves:
        if file.parent != folder:
            temporary = folder / f".{file.name}.part"
            shutil.copyfile(file, temporary)
            os.replace(temporary, folder / file.name)
        return
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as temporary_name:
        temporary = Path(temporary_name)
        extract(file, temporary)
        if download.inner:
            if not (temporary / download.inner).is_file():
                raise InputError(f"Expected {file} to hold {download.inner} but it does not")
            extract(temporary / download.inner, temporary)
        if download.finish == "class_archives":
            unpack_class_archives(temporary)
        elif download.finish == "validation_labels":
            sort_validation_images(temporary, places)
        absent = [source for source, _ in download.moves if not (temporary / source).exists()]
        if absent:
            raise InputError(f"Expected {file} to hold {', '.join(absent)} but it does not")
        for source, target in ((temporary / source, folder / target) for source, target in download.moves):
            if target.exists() and not is_empty(target):
                continue  # what is there already stays as it is
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                target.rmdir()
            if source == temporary:  # the archive has no folder of its own
                target.mkdir()
                for entry in sorted(temporary.iterdir()):
                    entry.rename(target / entry.name)
            else:
                source.rename(target)


def is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def unpack_class_archives(folder: Path) -> None:
    """Unpack ImageNet's training images: one archive per class, into a folder of its name."""
    for archive in sorted(folder.glob("*.tar")):
        (folder / archive.stem).mkdir()
        extract(archive, folder / archive.stem)
        archive.unlink()


def sort_validation_images(folder: Path, places: Sequence[Path]) -> None:
    """Sort ImageNet's validation images into a folder per class, by the labels in the development kit.

    Raises:
        InputError: there is no development kit, or it has more or fewer labels than there are images.
    """
    kit = next((path / DEVKIT for path in places if (path / DEVKIT).is_file()), None)
    if kit is None:
        raise InputError(
            f"Expected {DEVKIT} to lie beside ILSVRC2012_img_val.tar, for the labels of its images, but found none: "
            f"see {SOURCES['ImageNet'].page}"
        )
    images = sorted(path for path in folder.iterdir() if path.is_file())
    with tempfile.TemporaryDirectory(prefix=".devkit-", dir=folder) as temporary:
        extract(kit, Path(temporary))
        data = Path(temporary) / "ILSVRC2012_devkit_t12" / "data"
        synsets = files.read_mat(data / "meta.mat", "synsets").flatten()
        labels = [int(line) for line in files.read_lines(data / "ILSVRC2012_validation_ground_truth.txt")]
    wnids = {int(row["ILSVRC2012_ID"].item()): str(row["WNID"].item()) for row in synsets}
    if len(labels) != len(images):
        raise InputError(f"Expected {kit} to label {len(images):,} images but it labels {len(labels):,}")
    for image, label in zip(images, labels, strict=True):
        (folder / wnids[label]).mkdir(exist_ok=True)
        image.rename(folder / wnids[label] / image.name)


# --------------------------------------------------------------------------------------------------- downloading


def fetch(url: str, target: Path, timeout: float = 60.0) -> None:
    """Download `url` to `target`, going on from `target.part` where an earlier try left one; the size is checked.

    Raises:
        InputError: there is no answer, or not as many bytes as announced (what came is kept, to be resumed).
    """
    part = target.with_name(f"{target.name}.part")
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    logger.info(f"Downloading {url}" + (f", going on from byte {start:,}" if start else ""))
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
            if response.status != 206:  # the server sends it all again
                start = 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length is not None else None
            with open(part, "ab" if start else "wb") as stream:
                shutil.copyfileobj(response, stream, length=CHUNK)
    except urllib.error.HTTPError as error:
        whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if error.code != 416 or whole != str(start):  # 416: there is nothing after what we have
            raise InputError(f"Expected to download {url} but got: {error}") from error
        total = start
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        raise InputError(f"Expected to download {url} but got: {error}. Run the command again to resume") from error
    size = part.stat().st_size
    if total is not None and size != total:
        raise InputError(f"Expected {url} to have {total:,} bytes but got {size:,}. Run the command again to resume")
    os.replace(part, target)


# --------------------------------------------------------------------------------------------------- the command


def prepare(name: str, root: Path, archives: Path | None = None, download: bool = False) -> bool:
    """Check and complete a dataset's folder; return whether it is complete now."""
    source = SOURCES[name]
    folder = root / DATASET_REGISTRY.get(name).folder
    places = [place for place in (archives, folder, root) if place is not None]
    logger.info(f"{name}: {folder} (page and licence: {source.page})")
    # The split file first: it spares other parts.
    parts = sorted(source.parts, key=lambda part: not part.gives[0].startswith("split_"))
    missing = []
    for part in parts:
        if is_there(folder, part):
            logger.info(f"  [x] {', '.join(part.gives)}")
            continue
        if part.spared_by_split and has_split(name, folder):
            continue
        found = find_download(part, places)
        if found is None and download:
            wanted = next((item for item in part.downloads if item.url), None)
            if wanted is not None:
                folder.mkdir(parents=True, exist_ok=True)
                fetch(wanted.url, folder / wanted.file)
                found = wanted, folder / wanted.file
        if found is not None:
            put_in_place(*found, folder, places)
        if is_there(folder, part):
            logger.info(f"  [x] {', '.join(part.gives)} (from {found[1] if found else '?'})")
        else:
            missing.append(part)
            logger.info(f"  [ ] {', '.join(part.gives)}")
            for item in part.downloads:
                logger.info(f"        {item.file} from {item.url or part.page}" + (f" ({part.page})" * bool(item.url)))
    split_only = [part for part in missing if part.gives[0].startswith("split_")]
    if missing and len(missing) == len(split_only):
        logger.info("Without the published split file a split of our own is made: results do not compare with others'")
    elif missing:
        logger.info(f"{name} is not complete (see docs/DATASETS.md, section {name})")
        return False
    return check_counts(name, root)


def check_counts(name: str, root: Path) -> bool:
    """Read the dataset as training does and compare its classes and images with a complete copy's."""
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    cfg.merge_from_list(["DATASET.ROOT", str(root)])
    dataset = DATASET_REGISTRY.get(name)(cfg)
    counts = counts_of(dataset)
    expected = SOURCES[name].counts
    for what, got, wanted in zip(("classes", "train", "val", "test"), counts, expected, strict=True):
        logger.info(f"  {what:8}{got:>10,}" + ("" if got == wanted else f"   expected {wanted:,}"))
    if counts != expected:
        logger.info(f"{name} can be read, but it is not the published dataset")
        return False
    logger.info(f"{name} is complete")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="prepare_dataset.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("--root", required=True, type=Path, help="folder that holds the datasets")
    parser.add_argument("--archives", type=Path, help="folder with downloaded archives (besides --root)")
    parser.add_argument("--download", action="store_true", help="download what has a direct address")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        if args.name not in SOURCES:
            hint = did_you_mean(args.name, SOURCES)
            raise InputError(f"Expected one of {', '.join(SOURCES)} but got {args.name!r}{hint}")
        for folder in filter(None, (args.root, args.archives)):
            if not folder.expanduser().is_dir():
                raise InputError(f"Expected {folder} to be a folder but there is none")
        archives = args.archives.expanduser().absolute() if args.archives else None
        return 0 if prepare(args.name, args.root.expanduser().absolute(), archives, args.download) else 1
    except (InputError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(run_main(main))
