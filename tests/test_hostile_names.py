"""Classes and images with names that break out of what they are written into: one run, and all that comes of it."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import compare, report
from trainers.app import predict, train

ROOT = Path(train.__file__).parents[2]
CLASSES = ["a|b", "<script>alert(1)</script>", "$x_1^$ \\frac", "=1+1", "new\nline", "\x1b[31mred", "{}%s{0}"]
FILES = ["0.png", "a\nb.png", "=cmd.png", "<i>.png", "\x1b[2Jx.png", "$&%#_~.png"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_tiny) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        place = folder / "photos" / ("script" if "/" in name else name)  # no folder can be called "a/b"
        place.mkdir(parents=True)
        for file in FILES:
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(place / file)
    (folder / "photos" / "classes.json").write_text(json.dumps({"script": CLASSES[1]}))
    code = train.main(
        [
            *("--trainer", "JCLIPAdapter", "--config-file", str(ROOT / "configs/trainers/jclip/tiny.yaml")),
            *("--root", str(folder / "photos"), "--output-dir", str(folder / "run"), "--seed", "1"),
            *("DATASET.NAME", "ImageFolder", "MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", "False"),
            *("DATASET.NUM_SHOTS", "2", "OPTIM.MAX_EPOCH", "1", "DATALOADER.NUM_WORKERS", "0"),
            *("TRAINER.JCLIPADAPTER.VIEWS", "1"),
        ]
    )
    assert code == 0
    return folder / "run"


def test_the_run_has_its_classes_and_one_line_per_image(run):
    assert sorted(json.loads((run / "classes.json").read_text())) == sorted(CLASSES)
    tested = json.loads((run / "metrics.json").read_text())["test"]["n"]
    lines = (run / "result.txt").read_text().splitlines()
    assert len(lines) == tested and all(len(line.rsplit(" ", 5)) == 6 and line.isprintable() for line in lines)
    outside = {path.name for path in run.parent.iterdir()}
    assert outside == {"photos", "run"}  # nothing was written anywhere else


@pytest.mark.parametrize("form", ["--json", "--csv", "table"])
def test_predictions(run, capsys, form):
    photos = run.parent / "photos" / "new\nline"
    flags = [] if form == "table" else [form]
    assert predict.main(["--cpu", "--model-dir", str(run), *flags, "--top-k", "7", str(photos)]) == 0
    said = capsys.readouterr()
    if form == "--json":
        images = json.loads(said.out)["images"]
        assert sorted(Path(image["path"]).name for image in images) == sorted(FILES)
        assert {guess["class"] for guess in images[0]["predictions"]} == set(CLASSES)
    elif form == "--csv":
        rows = list(csv.DictReader(io.StringIO(said.out)))
        assert sorted(Path(row["path"]).name for row in rows) == sorted(FILES)
    else:
        lines = said.out.splitlines()
        assert len(lines) == 2 + len(FILES) and all(line.isprintable() for line in lines)
    result = (run / "predictions" / "result.txt").read_text().splitlines()
    assert len(result) == len(FILES) and all(line.isprintable() for line in result)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        assert not any(name.startswith("on") for name, _ in attributes)


def test_the_report_runs_no_script(run, tmp_path):
    assert report.main([f"<script>x|y</script>={run}", "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.found & {"script", "iframe", "object", "i", "b"} and "&lt;script&gt;x|y" in page


def test_tables_keep_their_cells():
    cells = compare.collect([compare.Record("=a|b\n<b>", "$m_1&x\\", 1, seed, 50.0) for seed in (1, 2)])
    row = next(line for line in compare.markdown(cells).splitlines() if "m_1" in line)
    assert row.count("|") == 3 and "<b>" not in compare.markdown(cells)
    assert compare.comma_separated(cells).splitlines()[1].startswith("'=a|b <b>,")
    row = next(line for line in compare.latex(cells).splitlines() if "m\\_1" in line)
    assert row.startswith("\\$m\\_1\\&x ") and row.replace("\\&", "").count("&") == 1
