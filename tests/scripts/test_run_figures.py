"""Figures and the report of a real run: what they show, what they say when something is missing, hostile names."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html.parser
import io
import json
import re
import shutil
import subprocess
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from dassl.evaluation.predictions import load_predictions
from dassl.utils import close_logger
from scripts import report
from scripts.figures import plot_confusion, plot_curves, plot_features, plot_gates, plot_logits, plot_mistakes
from scripts.figures.command import open_predictions
from scripts.figures.plot_confusion import confusion_figure, most_confused, shares_among
from scripts.figures.plot_curves import curve_panels, read_scalars
from scripts.figures.plot_features import chosen_images, embed, features_figure
from scripts.figures.plot_gates import gate_bins, gates_figure
from scripts.figures.plot_logits import head_logits, logits_figure
from scripts.figures.plot_shots import shots_figure
from scripts.figures.style import readable
from scripts.lib.runs import run_records
from trainers.app import train

ROOT = Path(train.__file__).parents[2]
NAMES = {"<b>bold<": "red", "$\\frac{1}{0}$ & 'so' \"on\"": "green", "a very long name of a class in ünïcödé": "blue"}
VOID = {"meta", "link", "img"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "data"
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 4), ("test", 8)):
        for name, color in NAMES.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
                Image.blend(Image.new("RGB", (64, 64), color), noise, 0.7).save(folder / part / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, random_tiny) -> Path:
    """A finished run of three epochs; its images are gone."""
    folder = photos.parent / "runs & <i>more" / "seed-1"
    code = train.main(
        [
            *("--root", str(photos), "--dataset-config-file", str(ROOT / "configs/datasets/image_folder.yaml")),
            *("--trainer", "DLRCLIP", "--config-file", str(ROOT / "configs/trainers/dlr/tiny.yaml"), "--seed", "-1"),
            *("--output-dir", str(folder), "MODEL.BACKBONE.WEIGHTS", str(random_tiny), "OPTIM.MAX_EPOCH", "3"),
            *("USE_CUDA", "False", "DATALOADER.TRAIN_X.BATCH_SIZE", "4"),
        ]
    )
    close_logger()
    assert code == 0
    shutil.rmtree(photos)
    return folder


@pytest.fixture(scope="module")
def predictions(run):
    return load_predictions(run)


# ---- the data of each figure


def test_predictions_are_those_that_the_metrics_count(run, predictions) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert predictions.heads == ["clip", "cma", "glr", "final", "fused"] == list(metrics["test"]["heads"])
    assert sorted(predictions.classnames) == sorted(NAMES) and (predictions.main, predictions.reference) == (
        "final",
        "clip",
    )
    for head, values in metrics["test"]["heads"].items():
        assert 100 * predictions.correct(head).mean() == pytest.approx(values["accuracy"])
    assert predictions.features.keys() == {"clip", "cma"} and predictions.features["cma"].shape == (24, 32)
    alpha, weight = predictions.values["alpha"], predictions.values["weight"]
    assert alpha.shape == weight.shape == (24,) and ((alpha > 0) & (alpha < 1)).all()
    clip, cma, glr, final = (predictions.logits[predictions.head(h)] for h in ("clip", "cma", "glr", "final"))
    assert np.allclose(final, weight[:, None] * cma + (1 - weight[:, None]) * glr, atol=1e-4)
    assert np.array_equal(clip[np.arange(24), predictions.labels], predictions.true[0])


def test_the_most_confused_classes_and_the_rest() -> None:
    before = np.array([[5, 0, 0, 5], [0, 9, 1, 0], [0, 0, 10, 0], [4, 0, 0, 6]])
    after = np.array([[10, 0, 0, 0], [0, 9, 1, 0], [0, 2, 8, 0], [0, 0, 0, 10]])
    assert most_confused([before, after], 2) == [0, 3] and most_confused([after], 2) == [1, 2]
    assert most_confused([before], 9) == [0, 1, 2, 3]
    expected = [[50, 50, 0], [40, 60, 0], [0, 0, 100]]  # errors between classes of the rest are other / other
    assert np.allclose(shares_among(before, [0, 3]), expected)
    assert np.allclose(shares_among(before, [0, 1, 2, 3]), before * 10.0)
    assert np.allclose(shares_among(np.array([[0, 0], [1, 3]]), [0, 1]), [[0, 0], [25, 75]])  # a class without images


def test_logits_of_a_head(predictions) -> None:
    found = head_logits(predictions, "final")
    logits = predictions.logits[predictions.head("final")]
    for i, label in enumerate(predictions.labels):
        assert found.true[i] == logits[i, label] and found.rival[i] == np.delete(logits[i], label).max()
    assert found.accuracy == 100 * (found.true > found.rival).mean()
    assert found.margin == pytest.approx(np.median(found.true - found.rival), abs=1e-5)


def test_a_constant_is_one_bar() -> None:
    edges = gate_bins(np.full(5, 0.5, np.float32))
    assert edges[0] == pytest.approx(0.49) and edges[-1] == pytest.approx(0.51)
    edges = gate_bins(np.array([0.1, 0.9]))
    assert edges[0] == pytest.approx(0.1) and edges[-1] == pytest.approx(0.9)


def test_tsne_is_repeatable_and_silhouettes_are_of_the_features(predictions) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 10)
    centres = np.eye(4)[labels] * 10
    apart, mixed = embed(centres + rng.normal(size=(20, 4)), labels), embed(rng.normal(size=(20, 4)), labels)
    assert apart.silhouette > 0.8 > 0.2 > mixed.silhouette
    again = embed(centres + np.random.default_rng(0).normal(size=(20, 4)), labels)
    assert np.array_equal(apart.points, again.points) and np.allclose(np.linalg.norm(apart.features, axis=1), 1)
    assert len(chosen_images(predictions, 2)) == 16 and len(chosen_images(predictions, 10)) == 24


def test_curves_are_those_of_the_event_files(run) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    scalars = read_scalars(run)
    panels = curve_panels(scalars, 3, list(metrics["train"]))
    loss = panels["loss"]["loss"]
    assert np.allclose(loss.epochs, [1, 2, 3]) and loss.values[-1] == pytest.approx(metrics["train"]["loss"], rel=1e-5)
    assert set(panels["loss"]) == set(metrics["train"]) - {"acc"}
    weight = panels["fusion weight w (mean, min to max)"]["mean"]
    assert len(weight.epochs) == 9 and weight.low is not None and weight.high is not None  # 12 images, 4 in a batch
    assert (weight.low <= weight.values).all() and (weight.values <= weight.high).all()
    assert "learning rate" in panels and not any("images" in title for title in panels)
    with pytest.raises(ValueError, match="no training step"):
        curve_panels({"when_done/test/final/accuracy": scalars["train/loss"]}, 3, [])
    one = {tag: (steps[:1], values[:1]) for tag, (steps, values) in scalars.items()}
    with pytest.raises(ValueError, match="one, which makes no curve"):
        curve_panels(one, 1, list(metrics["train"]))


# ---- the figures


def test_each_figure_shows_its_series_and_plain_names(predictions) -> None:
    confusion = confusion_figure(predictions, 2)
    shown = [label.get_text() for label in confusion.axes[0].get_yticklabels()]
    assert len(shown) == 3 and shown[-1] == "other"
    assert [axes.get_title().partition(",")[0] for axes in confusion.axes[:2]] == ["before: clip", "after: final"]
    titles = [axes.get_title() for axes in logits_figure(predictions).axes]
    assert [title.partition(":")[0] for title in titles] == ["clip", "cma", "glr", "final"]
    assert len(logits_figure(predictions, ["fused"]).axes) == 1
    gates = gates_figure(predictions)
    assert [axes.get_xlabel() for axes in gates.axes] == ["gate α", "fusion weight w"]
    for axes in gates.axes:  # the bars of each kind of image add up to 100 %
        filled = sum(patch.get_height() for patch in axes.patches if type(patch) is Rectangle)
        assert filled == pytest.approx(100 if predictions.correct("final").any() else 0, abs=0.01)
    features = features_figure(predictions)
    assert [axes.get_title().partition(":")[0] for axes in features.axes] == ["clip", "cma"]
    for axes in features.axes:
        assert sum(len(np.asarray(points.get_offsets())) for points in axes.collections) == 24
    texts = {label.get_text() for label in features.legends[0].get_texts()}
    assert texts == {readable(name, 22) for name in NAMES} and "<b>bold<" in texts
    for text in features.legends[0].get_texts():
        assert not text.get_parse_math()


@pytest.mark.parametrize("script", [plot_confusion, plot_curves, plot_features, plot_gates, plot_logits])
def test_each_command_draws_a_run_and_says_what_is_missing(run, tmp_path, capsys, script) -> None:
    stem = tmp_path / "out" / "figure"
    assert script.main([str(run), "--output", str(stem), "--formats", "pdf", "png", "svg"]) == 0
    assert (tmp_path / "out" / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert Image.open(tmp_path / "out" / "figure.png").width > 900  # 300 dots an inch
    ET.parse(tmp_path / "out" / "figure.svg")
    capsys.readouterr()
    for what, said in (("empty", "Expected a finished run but"), ("nowhere", ""), ("half", "")):
        folder = tmp_path / what
        if what != "nowhere":
            folder.mkdir()
        if what == "half":
            (folder / "DONE").write_text("{}")
            (folder / "metrics.json").write_text('{"trainer": "T", "dataset": "D", "shots": 1, "seed": 1}')
        assert script.main([str(folder), "--output", str(stem)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: Expected {said[9:]}") and len(error.splitlines()) == 1


def test_figures_go_to_the_run_by_default(run, tmp_path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    assert plot_logits.main([str(copy), "--formats", "png"]) == 0
    assert (copy / "figures" / "logits.png").is_file()
    assert open_predictions(copy / "predictions.safetensors").main == "final"


def test_what_a_method_does_not_tell_is_said(predictions) -> None:
    silent = dataclasses.replace(predictions, values={}, features={}, rows=predictions.rows[:0], reference="")
    with pytest.raises(ValueError, match="a method that tells alpha or w"):
        gates_figure(silent)
    with pytest.raises(ValueError, match="keeps image features"):
        features_figure(silent)
    assert len(confusion_figure(silent).axes) == 2  # one panel, and the scale
    with pytest.raises(ValueError, match="Expected a head out of clip"):
        logits_figure(predictions, ["none"])
    with pytest.raises(ValueError, match="at least one class"):
        confusion_figure(predictions, 0)


# ---- the page


class Page(html.parser.HTMLParser):
    """Tags that must close do; texts and what would be fetched are collected."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "summary", "code"):
            self.cells.append("")
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "summary", "code"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def page_file(run, tmp_path_factory) -> Path:
    """The report of the run, a copy without predictions, one that has not finished, and published numbers."""
    folder = tmp_path_factory.mktemp("report") / "more"
    poor = shutil.copytree(run, folder / "poor")
    (poor / "predictions.safetensors").unlink()
    (folder / "cut & <script>").mkdir()
    (folder / "cut & <script>" / "config.yaml").write_text("SEED: 1\n")
    csv = folder / "published.csv"
    csv.write_text("dataset,method,shots,accuracy\ndata,<i>Paper</i> $x$,16,70\n")
    output = folder.parent / "out" / "report.html"
    assert report.main([str(run), f"<u>poor={folder}", "--csv", str(csv), "--output", str(output)]) == 0
    return output


def test_the_page_is_whole_and_stands_alone(page_file, run) -> None:
    content = page_file.read_text(encoding="utf-8")
    page = Page(content)
    assert page.open == [] and not page.tags & {"script", "b", "i", "u", "iframe", "object"}
    assert all(source.startswith("data:") for source in page.sources)
    assert "url(" not in content and "@import" not in content
    images = [source for source in page.sources if source.startswith("data:image/svg+xml;base64,")]
    assert len(images) == 1 + 5 + 1  # by shots; all of the run; the curves of the one without predictions
    for image in images:
        ET.fromstring(base64.b64decode(image.partition(",")[2]))
    for fact in ("<u>poor", "final", str(run), "runs & <i>more"):
        assert any(fact in cell for cell in page.cells), fact
    accuracy = json.loads((run / "metrics.json").read_text())["test"]["heads"]["final"]["accuracy"]
    assert f"{accuracy:.2f}" in page.cells
    assert any(cell.endswith("cut & <script>") for cell in page.cells)
    assert re.search("Figures of predictions: not shown. Expected .*predictions.safetensors but there is none", content)


def test_the_page_is_the_same_each_time_and_in_a_browser(page_file, run, tmp_path) -> None:
    again = tmp_path / "again.html"
    folder = page_file.parents[1] / "more"
    assert (
        report.main([str(run), f"<u>poor={folder}", "--csv", str(folder / "published.csv"), "--output", str(again)])
        == 0
    )
    made = re.compile("<p class='missing'>Made [^<]*</p>")
    contents = [path.read_text(encoding="utf-8") for path in (again, page_file)]
    assert re.search(rf">Made \d{{4}}-\d\d-\d\d \d\d:\d\d by dlr-clip [^<]*--output {again}<", contents[0])
    assert made.sub("", contents[0]) == made.sub("", contents[1]) != contents[1]
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        warnings.warn("Chromium is not installed: the page was parsed, but not opened in a browser", stacklevel=1)
        return
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    result = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path}", page_file.as_uri()], capture_output=True, text=True, timeout=60
    )
    assert "CONSOLE" not in result.stderr and result.stdout.count("<img") == 7 and result.stdout.count("<table") == 6


def test_mistakes_are_shown_where_the_images_are(run, predictions, photos, tmp_path, capsys) -> None:
    (runs, _), wrong = report.find_runs([run]), np.flatnonzero(~predictions.correct("final"))
    title = f"The surest of {len(wrong)} mistakes"
    assert len(wrong) and f"{title}, with the probabilities of the wrong and of the true class: not shown" in (
        report.page(runs, [], [], most=1)
    )
    with open(run / "mistakes.csv", encoding="utf-8", newline="") as stream:
        listed = [row["path"] for row in csv.DictReader(stream)]
    assert sorted(listed) == sorted(predictions.paths[i] for i in wrong)
    assert Image.open(run / "mistakes.png").width > 900
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert re.search(r"^Worst classes:\n\* .* \(\d of 8 correct, \d taken for .*\)$", log, re.MULTILINE)
    assert f"Wrong: {len(wrong)} of 24 images, the surest first in {run / 'mistakes.csv'}, the first" in log
    try:
        for path in map(Path, listed):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), "orange").save(path)
        content = report.page(runs, [], [], most=1)
        (sheet,) = re.findall("<img src='data:image/png;base64,([^']*)'", content)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))))
        assert (pixels == (255, 165, 0)).all(-1).sum() == len(wrong) * 96 * 96
        assert plot_mistakes.main([str(run), "--number", "1", "--output", str(tmp_path / "new" / "one.png")]) == 0
        one = np.asarray(Image.open(tmp_path / "new" / "one.png"))
        assert (one == (255, 165, 0)).all(-1).sum() == 96 * 96
    finally:
        shutil.rmtree(photos)
    for arguments, said in (["--number", "0"], "at least 1"), (["--head", "none"], "Expected a head out of clip"):
        assert plot_mistakes.main([str(run), *arguments]) == 2
        assert said in capsys.readouterr().err


def test_zero_shot_runs_with_several_numbers_of_shots_are_one(run) -> None:
    runs, _ = report.find_runs([run])
    twice = [
        runs[0]._replace(metrics={**runs[0].metrics, "trainer": "ZeroshotCLIP", "shots": shots}) for shots in (1, 2)
    ]
    other = runs[0]._replace(metrics={**twice[0].metrics, "accuracy": 1.0, "test": {"heads": {}}})
    assert len(run_records(twice)) == 1 and {row[-1] for row in report.heads_rows(twice)} == {"1"}
    assert "not shown" not in report.attempt(lambda: shots_figure(run_records(twice)), "figure")
    with pytest.raises(ValueError, match="Expected one run of ZeroshotCLIP"):  # with other numbers they are not
        run_records([*twice, other])


def test_a_report_of_nothing_is_an_error(tmp_path, capsys) -> None:
    assert report.main([str(tmp_path), "--output", str(tmp_path / "x.html")]) == 2
    assert "error: Expected finished runs" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_many_runs_have_sections_for_the_first_only(run, tmp_path) -> None:
    runs, _ = report.find_runs([run])
    content = report.page([*runs, *(r._replace(label="other") for r in runs)], [], [], most=0)
    assert "<details" not in content and "2 more runs have no section" in content
