"""What is wrong with photos: each fault is planted, and has to be found; the page is read by a real parser."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from color_photos import COLORS, draw
from PIL import Image
from torch.nn import functional as F

from dassl.utils import InputError
from scripts.inspect_photos import main as inspect
from trainers import FewShotClassifier
from trainers.api.inspection import ALIKE, TEST, TRAINING, Photo, find_twins
from trainers.app.train import main as train


@pytest.fixture
def folder(tmp_path):
    """Photos of three colors with a part for training and one for testing, and one fault of each kind."""
    root = tmp_path / "my <photos>"
    draw(root / "train", dict.fromkeys(COLORS, 6))
    draw(root / "test", dict.fromkeys(COLORS, 4), seed=1)
    shutil.copy(root / "train" / "red" / "0.png", root / "test" / "red" / "copy.png")  # a leak
    pattern = np.random.default_rng(5).integers(0, 60, (4, 4, 3)) + np.array(COLORS["green"]) // 2
    picture = Image.fromarray(pattern.astype(np.uint8)).resize((150, 120), Image.Resampling.BICUBIC)
    picture.save(root / "train" / "green" / "pattern.png")
    picture.resize((96, 80)).save(root / "test" / "green" / "resized.jpg")
    shutil.copy(root / "test" / "blue" / "3.png", root / "test" / "red" / "wrong.png")  # a wrong label
    Image.new("RGB", (9, 9), (40, 60, 200)).save(root / "test" / "blue" / "tiny.png")
    (root / "test" / "blue" / "broken.png").write_bytes(b"no image")
    return root


def names(items):
    return {Path(item.photo.path).name for item in items}


def test_planted_faults_are_found(folder, tiny_weights, tmp_path):
    clf = FewShotClassifier("LinearProbe", "tiny", weights=tiny_weights or None, config="tiny_text")
    clf.set_params(settings={"DATALOADER.SKIP_BAD_IMAGES": True}).fit(folder)
    found = clf.inspect(folder, file=tmp_path / "page.html")
    leaks = {(Path(pair.first.path).name, Path(pair.second.path).name) for pair in found.leaks}
    assert leaks == {("0.png", "copy.png"), ("pattern.png", "resized.jpg")}
    apart = [pair for pair in found.twins if pair.disagrees]
    assert [sorted(Path(photo.path).name for photo in pair[:2]) for pair in apart] == [["3.png", "wrong.png"]]
    assert "wrong.png" in names(found.mistakes) and found.mistakes[0].score >= found.mistakes[-1].score
    assert [Path(path).name for path in found.broken] == ["broken.png"]
    assert {Path(path).name: size for path, size in found.tiny.items()} == {"tiny.png": (9, 9)}
    red, blue = found.names.index("red"), found.names.index("blue")
    assert found.confused[red, blue] >= 1 and found.judged == 16
    assert found.counts[TRAINING] == [6, 7, 6] and sum(found.counts[TEST]) == 17
    check_page((tmp_path / "page.html").read_text(encoding="utf-8"), "my <photos>")
    # What was learnt from is judged by the runs that it was held out of.
    own = clf.inspect()
    assert own.judged == 19 + 16 and own.counts[TRAINING] == [6, 7, 6]


class Elements(HTMLParser):
    """Collect the elements of a page, its text, and all that it would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def check_page(text, title):
    page = Elements()
    page.feed(text)
    assert any(title in part for part in page.texts) and "photos" not in page.tags
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert page.tags.count("img") > 5 and any("too good to be true" in part for part in page.texts)


def test_of_a_run_and_of_a_saved_classifier(folder, tiny_weights, tmp_path, capsys):
    weights = ["MODEL.BACKBONE.WEIGHTS", tiny_weights] if tiny_weights else []
    run = tmp_path / "run"
    argv = [
        "--trainer",
        "GDA",
        "--config",
        "tiny",
        "--root",
        str(folder),
        "--output-dir",
        str(run),
        "--skip-bad-images",
    ]
    assert train([*argv, *weights]) == 0
    page = tmp_path / "run.html"
    capsys.readouterr()
    assert inspect([str(run), "--output", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "3 near-duplicates, 1 broken files, 1 tiny photos" in out
    assert "WARNING: 2 test photos" in err
    check_page(page.read_text(encoding="utf-8"), "my <photos>")

    saved = tmp_path / "model.safetensors"
    FewShotClassifier.from_run(run).save(saved)
    if not tiny_weights:  # a saved classifier has no place for the path of other weights
        assert inspect([str(saved), "--images", str(folder), "--output", str(page)]) == 0
    assert inspect([str(saved), "--output", str(page)]) == 2
    assert "Expected --images" in capsys.readouterr().err
    strange = tmp_path / "strange"
    draw(strange, {"red": 2})
    (strange / "red").rename(strange / "pink")
    draw(strange, {"blue": 2})
    assert inspect([str(run), "--images", str(strange), "--output", str(page)]) == 2
    assert "'pink'" in capsys.readouterr().err
    assert not (strange / "split.json").exists()


def test_photos_that_were_given_as_images_are_asked_for(photos, tiny_weights):
    images = [Image.open(path).copy() for path in photos[0]]
    clf = FewShotClassifier("ZeroshotCLIP", "tiny", weights=tiny_weights or None, calibration=None)
    clf.fit(images, photos[1])
    with pytest.raises(InputError, match="name the folder"):
        clf.inspect()


def test_twins_by_all_pairs(tmp_path):
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(40, 30))).float()
    rows[7], rows[21] = rows[3] + 0.01 * rows[5], rows[3]
    rows[30] = 0  # one shade
    rows[31] = 0
    squares = F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)
    photos = []
    for number in range(40):
        path = tmp_path / f"{number}"
        path.write_text(f"{number}")
        photos.append(Photo(str(path), number % 2, TRAINING if number < 20 else TEST))
    naive = {
        (i, j) for i in range(40) for j in range(i + 1, 40) if float(squares[i] @ squares[j]) >= ALIKE
    }  # fmt: skip
    found = {(photos.index(pair.first), photos.index(pair.second)) for pair in find_twins(photos, squares)}
    assert found == naive == {(3, 7), (3, 21), (7, 21)}
    assert [pair.leaks for pair in find_twins(photos, squares)] == [True, True, False]
