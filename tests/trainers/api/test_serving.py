"""The local page: its answers are the classifier's, corrections are kept, and a real browser sees it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from color_photos import COLORS
from PIL import Image

from dassl.utils import InputError
from scripts.serve import main as serve
from trainers import FewShotClassifier
from trainers.api.serve_page import build_page, launch
from trainers.api.serving import ZERO_SHOT, PhotoServer, answers_html, names_in
from trainers.app.data import layout
from trainers.app.prediction import load_model, model_arguments


@pytest.fixture(scope="module")
def fitted(photos, tiny_weights):
    if tiny_weights:
        pytest.skip("the bundled CLIP is not there, and a saved classifier has no place for the path of other weights")
    return FewShotClassifier("GDA", "tiny", seed=2).fit(*photos)


@pytest.fixture(scope="module")
def server(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    fitted.save(folder / "model.safetensors")
    return PhotoServer(load_model(model_arguments(folder / "model.safetensors")), folder / "corrections")


def test_answers_are_those_of_the_classifier(server, fitted, more_photos):
    paths = more_photos[0]
    answers = server.answer(paths)
    rows = fitted.predict_proba(paths)
    for one, row in zip(answers, rows, strict=True):
        assert dict(one.guesses) == pytest.approx(dict(zip(fitted.classes_, row, strict=True)), abs=1e-5)
    assert server.heads[0] == "gda" and server.heads[-1] == ZERO_SHOT


def test_other_names_are_asked_of_zero_shot_clip(server, more_photos):
    (answer,) = server.answer(more_photos[0][:1], names=["gray", "red"])
    assert {name for name, _ in answer.guesses} == {*COLORS, "gray"}
    (same,) = server.answer(more_photos[0][:1], ZERO_SHOT)
    assert {name for name, _ in same.guesses} == set(COLORS)
    assert sum(p for _, p in same.guesses) == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="Expected the head"):
        server.answer(more_photos[0][:1], "none")


def test_broken_files_are_named_and_the_rest_go_on(server, more_photos, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad, good = server.answer([str(tmp_path / "bad.png"), more_photos[0][0]])
    assert "bad.png" in bad.problem and good.guesses
    page = answers_html([bad, good], {bad.path: "<b>bad</b>"})
    assert "<b>bad</b>" not in page and "&lt;b&gt;bad" in page


def test_corrections_are_kept_for_the_next_training(server, more_photos, tmp_path):
    path = more_photos[0][0]
    first = server.correct(path, "crimson red")
    assert server.correct(path, "crimson red") == first and Path(path).read_bytes() == first.read_bytes()
    assert first.parent == server.corrections / "crimson red"
    assert server.correct(path, "../../away/blue").parent.parent == server.corrections
    found = layout.scan_folder(server.corrections)
    assert {photo.key for photo in found} == {"crimson red", "_.._away_blue"}
    with pytest.raises(InputError, match="the name of a class"):
        server.correct(path, " . ")


def test_names_in_a_text():
    assert names_in("cat, dog\n bird,,cat ") == ["cat", "dog", "bird"] and names_in("") == []


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    pytest.importorskip("gradio")
    assert serve([str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def browser_path():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_a_real_browser_sees_it(server, more_photos, tmp_path):
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    path = browser_path()
    if path is None:
        pytest.skip("no Chromium here")
    page = build_page(server, "Colors <of> photos")
    _, address, _ = launch(page, None, block=False)
    assert address.startswith("http://127.0.0.1:")
    try:
        with sync_api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page(viewport={"width": 1200, "height": 900})
            asked = []
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(address)
            tab.set_input_files("#photos input[type=file]", more_photos[0][:2])
            tab.wait_for_selector(".photo .bar", timeout=30_000)
            assert tab.locator(".photo").count() == 2
            first = tab.locator(".photo .bar label").first.inner_text()
            assert first == server.answer(more_photos[0][:1])[0].guesses[0][0]
            tab.get_by_label("Other class names").fill("gray, orange")
            tab.get_by_label("Other class names").press("Enter")
            tab.wait_for_function("document.querySelectorAll('.photo')[0].querySelectorAll('.bar').length == 5")
            tab.screenshot(path=tmp_path / "page.png")
            browser.close()
    finally:
        page.close()
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside, outside
    assert np.asarray(Image.open(tmp_path / "page.png")).std() > 5
