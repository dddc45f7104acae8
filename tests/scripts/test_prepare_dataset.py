"""Preparing a benchmark: what is missing is said, archives are unpacked, downloads resumed, counts compared."""

from __future__ import annotations

import http.server
import io
import re
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from dataset_trees import OTHERS, TREES, WNIDS, make_tree
from scipy.io import savemat

from dassl.data.datasets import DATASET_REGISTRY
from dassl.utils import InputError
from scripts import prepare_dataset
from scripts.lib.dataset_sources import SOURCES, Download
from scripts.prepare_dataset import extract, fetch, main

COUNTS = {
    "EuroSAT": (4, 20, 8, 12),
    "FGVCAircraft": (3, 18, 9, 9),
    "ImageNetR": (2, 0, 0, 6),
    "ImageNet": (4, 48, 0, 12),
}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A dataset root; the published counts are those of the miniature trees."""
    for name, counts in COUNTS.items():
        monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(counts=counts))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def run(name: str, root: Path, *more: str) -> int:
    return main([name, "--root", str(root), *more])


def pack(archive: Path, folder: Path, prefix: str = "") -> None:
    """Put the content of `folder` under `prefix` into a zip or tar archive."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as opened:
            for path in files:
                opened.write(path, f"{prefix}{path.relative_to(folder)}")
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix in (".gz", ".tgz") else "w") as tar:
            for path in files:
                tar.add(path, f"{prefix}{path.relative_to(folder)}")


@pytest.mark.parametrize("name", SOURCES)
def test_every_benchmark_has_a_source_that_fits_its_reader(name):
    reader, source = DATASET_REGISTRY.get(name), SOURCES[name]
    given = {path for part in source.parts for path in part.gives}
    images = getattr(reader, "images", "")
    needed = set(getattr(reader, "sources", (images,)))
    assert needed <= given | {path.rpartition("/")[0] for path in given}
    if getattr(reader, "split_name", ""):
        assert reader.split_name in given
    for part in source.parts:
        assert part.page.startswith("https://") and part.downloads
        for download in part.downloads:
            targets = {target for _, target in download.moves} or {download.file}
            assert all(any(f"{path}/".startswith(f"{t}/") for t in targets) for path in part.gives)
            assert not download.url or re.match(r"https?://\S+$", download.url)
            assert not download.url or download.url.endswith(download.file)


def test_all_benchmarks_are_known():
    assert set(SOURCES) == set(TREES) - set(OTHERS)


def test_empty_folder_lists_what_is_missing_and_where_it_is(root, capsys):
    assert run("EuroSAT", root) == 1
    said = capsys.readouterr().out
    for word in ("[ ] 2750", "EuroSAT.zip", "EuroSAT_RGB.zip", "[ ] split_zhou_EuroSAT.json", "CoOp", "phelber"):
        assert word in said
    assert "section EuroSAT" in said
    assert list(root.iterdir()) == []


def test_complete_folder(root, capsys):
    make_tree("FGVCAircraft", root)
    assert run("FGVCAircraft", root) == 0
    assert "FGVCAircraft is complete" in capsys.readouterr().out


def test_counts_that_differ(root, capsys):
    make_tree("ImageNetR", root)
    next((root / "imagenet-rendition").rglob("*.jpg")).unlink()
    assert run("ImageNetR", root) == 1
    assert re.search(r"test\s+5\s+expected 6", capsys.readouterr().out)


def test_missing_images_are_named(root, capsys):
    make_tree("FGVCAircraft", root)
    (root / "fgvc_aircraft" / "images" / "0000003.jpg").unlink()
    assert run("FGVCAircraft", root) == 2
    assert "0000003.jpg" in capsys.readouterr().err


def test_split_of_our_own_is_said_not_to_compare(root, capsys):
    make_tree("EuroSAT", root)
    assert run("EuroSAT", root) == 0
    assert "split of our own" in capsys.readouterr().out


def test_split_file_spares_the_annotations(root, capsys, monkeypatch):
    make_tree("OxfordPets", root)
    monkeypatch.setitem(SOURCES, "OxfordPets", SOURCES["OxfordPets"]._replace(counts=(3, 30, 6, 12)))
    assert run("OxfordPets", root) == 0  # makes the split file
    shutil.rmtree(root / "oxford_pets" / "annotations")
    assert run("OxfordPets", root) == 0
    (root / "oxford_pets" / "split_zhou_OxfordPets.json").unlink()
    assert run("OxfordPets", root) == 1
    assert "annotations.tar.gz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "folder", "archive", "prefix"),
    [
        ("EuroSAT", "eurosat/2750", "EuroSAT.zip", "2750/"),
        ("EuroSAT", "eurosat/2750", "EuroSAT_RGB.zip", "EuroSAT_RGB/"),
        ("FGVCAircraft", "fgvc_aircraft", "fgvc-aircraft-2013b.tar.gz", "fgvc-aircraft-2013b/data/"),
        ("ImageNetR", "imagenet-rendition/imagenet-r", "imagenet-r.tar", "imagenet-r/"),
    ],
)
@pytest.mark.parametrize("place", ["root", "archives"])
def test_archives_are_unpacked(root, tmp_path, name, folder, archive, prefix, place):
    make_tree(name, tmp_path / "made")
    where = root if place == "root" else tmp_path / "downloads"
    where.mkdir(exist_ok=True)
    pack(where / archive, tmp_path / "made" / folder, prefix)
    if name == "ImageNetR":
        shutil.copy(tmp_path / "made" / "imagenet-rendition" / "classnames.txt", where)
    assert run(name, root, *([] if place == "root" else ["--archives", str(where)])) == 0
    assert (where / archive).exists()
    assert not [path for path in root.rglob(".*")]  # nothing temporary is left


def test_archive_in_an_archive(root, tmp_path, monkeypatch):
    make_tree("Caltech101", tmp_path / "made")
    inner = tmp_path / "inner" / "101_ObjectCategories.tar.gz"
    inner.parent.mkdir()
    pack(inner, tmp_path / "made" / "caltech-101")
    pack(root / "caltech-101.zip", inner.parent, "caltech-101/")
    monkeypatch.setitem(SOURCES, "Caltech101", SOURCES["Caltech101"]._replace(counts=(4, 28, 12, 18)))
    assert run("Caltech101", root) == 0


def test_imagenets_archives(root, tmp_path, capsys):
    """One archive per class for training; validation images without folders, their labels in the development kit."""
    make_tree("ImageNet", tmp_path / "made")
    images = tmp_path / "made" / "imagenet" / "images"
    (images / "train" / "README.txt").unlink()
    classes = tmp_path / "classes"
    classes.mkdir()
    for wnid in WNIDS:
        pack(classes / f"{wnid}.tar", images / "train" / wnid)
    pack(root / "ILSVRC2012_img_train.tar", classes)
    flat = tmp_path / "flat"
    flat.mkdir()
    labels = []
    for number, path in enumerate(sorted((images / "val").glob("*/*"), key=lambda p: p.name[::-1]), start=1):
        shutil.copy(path, flat / f"ILSVRC2012_val_{number:08d}.JPEG")
        labels.append(WNIDS.index(path.parent.name) + 1)
    pack(root / "ILSVRC2012_img_val.tar", flat)
    shutil.copy(tmp_path / "made" / "imagenet" / "classnames.txt", root)
    assert run("ImageNet", root) == 2
    assert "ILSVRC2012_devkit_t12.tar.gz" in capsys.readouterr().err
    assert not (root / "imagenet" / "images" / "val").exists()

    kit = tmp_path / "kit" / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    synsets = np.zeros((4, 1), dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    for number, wnid in enumerate(WNIDS):
        synsets[number, 0] = (number + 1, wnid)
    savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, labels)))
    pack(root / "ILSVRC2012_devkit_t12.tar.gz", tmp_path / "kit")
    assert run("ImageNet", root) == 0
    for wnid in WNIDS:
        made = {path.read_bytes() for path in (images / "val" / wnid).iterdir()}
        assert {path.read_bytes() for path in (root / "imagenet" / "images" / "val" / wnid).iterdir()} == made


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 and no more"])
def test_damaged_archive_is_named_and_leaves_nothing(root, capsys, content):
    (root / "EuroSAT.zip").write_bytes(content)
    assert run("EuroSAT", root) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Expected ") and "EuroSAT.zip" in error
    assert not list((root / "eurosat").iterdir())


def test_archive_that_was_cut_short(root, tmp_path, capsys):
    make_tree("FGVCAircraft", tmp_path / "made")
    archive = root / "fgvc-aircraft-2013b.tar.gz"
    pack(archive, tmp_path / "made" / "fgvc_aircraft", "fgvc-aircraft-2013b/data/")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    assert run("FGVCAircraft", root) == 2
    assert archive.name in capsys.readouterr().err
    assert not list((root / "fgvc_aircraft").iterdir())


def test_archive_with_other_content(root, tmp_path, capsys):
    make_tree("EuroSAT", tmp_path / "made")
    pack(root / "EuroSAT.zip", tmp_path / "made" / "eurosat" / "2750", "other/")
    assert run("EuroSAT", root) == 2
    assert "to hold 2750" in capsys.readouterr().err
    assert not list((root / "eurosat").iterdir())


def test_archive_that_would_write_elsewhere(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=r"evil.tar.*outside"):
        extract(tmp_path / "evil.tar", tmp_path / "in")
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("argv", [["Eurosat", "--root", "{}"], ["EuroSAT", "--root", "{}/nowhere"]])
def test_wrong_arguments(root, capsys, argv):
    assert main([arg.format(root) for arg in argv]) == 2
    assert re.search("EuroSAT|nowhere", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------ downloads


class Server(http.server.BaseHTTPRequestHandler):
    content = b""
    cut = -1  # send only so many bytes of each answer
    ranges = True
    asked: list[str] = []

    def do_GET(self) -> None:
        start = 0
        wanted = self.headers.get("Range") if self.ranges else None
        self.asked.append(self.headers.get("Range") or "")
        if wanted:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(self.content)}")
                self.end_headers()
                return
        self.send_response(206 if wanted else 200)
        body = self.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.cut < 0 else body[: self.cut])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[type[Server], str]]:
    handler = type("Handler", (Server,), {"asked": [], "content": bytes(range(256)) * 40})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, f"http://127.0.0.1:{httpd.server_port}/file.bin"
        httpd.shutdown()
        thread.join()


def test_download_is_resumed_and_its_size_checked(server, tmp_path):
    handler, url = server
    target = tmp_path / "file.bin"
    handler.cut = 3000
    for got in (3000, 6000):
        with pytest.raises(InputError, match="to resume"):
            fetch(url, target)
        assert (tmp_path / "file.bin.part").stat().st_size == got and not target.exists()
    handler.cut = -1
    fetch(url, target)
    assert target.read_bytes() == handler.content
    assert handler.asked == ["", "bytes=3000-", "bytes=6000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_part_that_is_whole_already(server, tmp_path):
    handler, url = server
    (tmp_path / "file.bin.part").write_bytes(handler.content)
    fetch(url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == handler.content


def test_server_without_ranges_starts_anew(server, tmp_path):
    handler, url = server
    handler.ranges = False
    (tmp_path / "file.bin.part").write_bytes(b"beginning of something")
    fetch(url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == handler.content


def test_no_answer_is_named(tmp_path):
    with pytest.raises(InputError, match="127.0.0.1:9/x.zip"):
        fetch("http://127.0.0.1:9/x.zip", tmp_path / "x.zip", timeout=2)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_downloaded_unless_asked_for(root, tmp_path, server, monkeypatch):
    handler, url = server
    make_tree("EuroSAT", tmp_path / "made")
    pack(tmp_path / "EuroSAT.zip", tmp_path / "made" / "eurosat" / "2750", "2750/")
    handler.content = (tmp_path / "EuroSAT.zip").read_bytes()
    source = SOURCES["EuroSAT"]
    part = source.parts[0]._replace(downloads=(Download("EuroSAT.zip", url, (("2750", "2750"),)),))
    monkeypatch.setitem(prepare_dataset.SOURCES, "EuroSAT", source._replace(parts=(part, *source.parts[1:])))
    assert run("EuroSAT", root) == 1 and handler.asked == []
    assert run("EuroSAT", root, "--download") == 0 and handler.asked == [""]
