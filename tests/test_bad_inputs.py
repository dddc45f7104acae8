"""Everything that can be wrong with what is given: one line that says what was expected and what came, exit code 2.

The table of docs/RELIABILITY.md has a row per case here, and its messages are the expected ones. After a change,
WRITE_TABLE=1 pytest -p no:xdist -n 0 tests/test_bad_inputs.py writes it anew, for reading before it is committed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts import parse_results, report
from scripts.figures import plot_shots
from trainers.app import predict, train

ROOT = Path(train.__file__).parents[2]
DOCS = ROOT / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- bad inputs: begin -->", "<!-- bad inputs: end -->"
CONFIG = str(ROOT / "configs/trainers/clip_adapter/tiny.yaml")


class Place:
    """Where a case plays: its own folder, and what all share."""

    def __init__(self, folder: Path, photos: Path, weights: Path, run: Path) -> None:
        self.folder, self.photos, self.weights, self.run = folder, photos, weights, run

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    def own_photos(self) -> Path:
        """A copy of the photos, to be spoilt."""
        return Path(shutil.copytree(self.photos, self.folder / "photos"))

    def own_run(self) -> Path:
        """A copy of the finished run, to be spoilt."""
        return Path(shutil.copytree(self.run, self.folder / "run"))

    def train(self, *pairs: str, flags: tuple[str, ...] = (), root: Path | str = "", trainer: str = "") -> list[str]:
        """A command line of train.py that would be right."""
        return [
            *("--trainer", trainer or "CLIPAdapter"),
            *("--config-file", CONFIG, "--root", str(root or self.photos), "--output-dir", str(self.folder / "out")),
            *("--seed", "1", *flags, "DATASET.NAME", "ImageFolder", "MODEL.BACKBONE.WEIGHTS", str(self.weights)),
            *("DATASET.NUM_SHOTS", "1", "OPTIM.MAX_EPOCH", "1", "USE_CUDA", "False", "DATALOADER.NUM_WORKERS", "0"),
            *("TRAINER.CLIPADAPTER.VIEWS", "1", *pairs),
        ]

    def config(self, content: str | bytes) -> list[str]:
        """The same with a config file of this content."""
        return self.train(flags=("--config-file", self.file("my.yaml", content)))

    def evaluate(self, run: Path | str, *pairs: str) -> list[str]:
        return self.train(*pairs, flags=("--eval-only", "--model-dir", str(run)))

    def predict(self, *flags: str, run: Path | None = None, image: str | None = None) -> list[str]:
        image = image or str(next(self.photos.rglob("*.png")))
        return ["--cpu", "--model-dir", str(run or self.run), *flags, image]


class Case(NamedTuple):
    """What is wrong, a command line that has it, whose it is, and where a library's own words begin, if they do."""

    what: str
    make: Callable[[Place], list[str]]
    program: Callable[[list[str]], int] = train.main
    words: str = ""
    late: bool = False  # seen only when the run has begun


class Touch:
    """Pickled, a call that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def hostile(place: Place) -> bytes:
    return pickle.dumps({"state_dict": Touch(place.folder / "trap")})


def spoil(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def with_split(place: Place, change: Callable[[dict], object]) -> list[str]:
    photos = place.own_photos()
    content = json.loads((photos / "split.json").read_text())
    change(content)
    (photos / "split.json").write_text(json.dumps(content))
    return place.train(root=photos)


def swap(item: list, position: int, value: object) -> list:
    item[position] = value
    return item


def with_file(place: Place, name: str, content: str) -> list[str]:
    photos = place.own_photos()
    (photos / name).write_text(content)
    return place.train(root=photos)


def numbers(place: Place, content: str) -> list[str]:
    return [str(place.folder), "--csv", place.file("a.csv", content)]


def with_run(place: Place, name: str, content: str | bytes) -> list[str]:
    run = place.own_run()
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place.predict(run=run)


def with_checkpoint(place: Place, change: Callable[[bytes], bytes]) -> list[str]:
    run = place.own_run()
    for sums in (run / "adapter").glob("*.sha256"):  # a file without one, as others make it
        sums.unlink()
    spoil(next((run / "adapter").glob("model.pth.tar-*")), change)
    return place.evaluate(run)


def other_weights(place: Place) -> list[str]:
    folder = Path(shutil.copytree(place.weights, place.folder / "other"))
    state = {
        name: value * 2 for name, value in load_file(folder / "tiny_clip.safetensors").items() if "ids" not in name
    }
    rows = load_file(folder / "tiny_clip.safetensors")
    save_file({**rows, **state}, folder / "tiny_clip.safetensors")
    return place.evaluate(place.run, "MODEL.BACKBONE.WEIGHTS", str(folder))


def cut_weights(place: Place) -> list[str]:
    folder = Path(shutil.copytree(place.weights, place.folder / "cut"))
    spoil(folder / "tiny_clip.safetensors", lambda content: content[:10_000])
    return place.train("MODEL.BACKBONE.WEIGHTS", str(folder))


def spoilt_photo(place: Place) -> list[str]:
    photos = place.own_photos()
    for path in photos.rglob("*.png"):
        spoil(path, lambda content: content[: len(content) // 2])
    return place.train(root=photos, flags=("--no-cache",))


def long_photo(place: Place) -> list[str]:
    photos = place.own_photos()
    for path in photos.rglob("*.png"):
        Image.new("RGB", (1000, 2)).save(path)
    return place.train(root=photos, flags=("--no-cache",))


def clip_file(place: Place, content: bytes) -> list[str]:
    return place.train("MODEL.BACKBONE.NAME", "ViT-B/32", "MODEL.BACKBONE.WEIGHTS", place.file("clip.pt", content))


def few_photos(place: Place) -> list[str]:
    photos = place.own_photos()
    (photos / "split.json").unlink()
    for path in sorted((photos / "cat").iterdir())[1:]:
        path.unlink()
    return place.train(root=photos)


def linked_photos(place: Place, name: str = "cow") -> list[str]:
    photos = place.own_photos()
    (photos / "split.json").unlink()
    (photos / name).symlink_to(photos / "nowhere")
    return place.train(root=photos)


def laid_out(place: Place, *names: str, flat: bool = False) -> list[str]:
    for name in names:
        shutil.copytree(place.photos / "cat" if flat else place.photos, place.folder / "own" / name)
    return place.train(root=place.folder / "own")


def unnamed(place: Place) -> list[str]:
    (place.folder / "own" / "eurosat").mkdir(parents=True)
    return place.train("DATASET.NAME", "", root=place.folder / "own")


def integer_photos(place: Place) -> list[str]:
    photos = place.own_photos()
    for path in photos.rglob("*.png"):
        Image.new("I", (64, 64)).save(path, "TIFF")
    return place.train(root=photos, flags=("--no-cache",))


def long_names(place: Place) -> list[str]:
    names = place.file("names.json", json.dumps({"cat": "cat " * 70}))
    photos = place.own_photos()
    Path(names).rename(photos / "classes.json")
    (photos / "split.json").unlink()
    coop = str(ROOT / "configs/trainers/coop/tiny.yaml")
    argv = place.train(flags=("--config-file", coop), root=photos, trainer="CoOp")
    return [*argv[: argv.index("TRAINER.CLIPADAPTER.VIEWS")], "TRAINER.COOP.CTX_INIT", ""]


def other_photos(place: Place) -> list[str]:
    photos = place.own_photos()
    for path in photos.rglob("*.png"):
        Image.effect_noise((80, 80), 50).save(path)
    return place.train("OUTPUT_DIR", str(place.own_run()), root=photos)


def csv_of(place: Place, content: str) -> list[str]:
    return place.train(root=place.file("list.csv", content))


def runs_with(place: Place, content: str) -> list[str]:
    run = place.own_run()
    (run / "metrics.json").write_text(content)
    return [str(run), "--output", str(place.folder / "out.html")]


CASES = [
    # The command line
    Case("no trainer", lambda p: ["--seed", "1"]),
    Case("a trainer misspelt", lambda p: p.train(trainer="CLIPAdaptor")),
    Case("a trainer by the name that others give it", lambda p: p.train(trainer="MultiModalAdapter")),
    Case("a trainer without a configuration", lambda p: ["--trainer", "CLIPAdapter"]),
    Case("a configuration that there is not", lambda p: ["--trainer", "CLIPAdapter", "--config", "tinny"]),
    Case("two configurations", lambda p: ["--config", "tiny", *p.train()]),
    Case("a configuration of no trainer", lambda p: ["--config", "tiny"]),
    Case("a dataset that there is not", lambda p: p.train("DATASET.NAME", "ImageFolders")),
    Case("an unknown flag", lambda p: ["--epochs", "3", *p.train()]),
    Case("a key without a value", lambda p: p.train("OPTIM.LR")),
    Case("a flag after the pairs", lambda p: p.train("--seed", "2")),
    Case("`--model-dir` without `--eval-only`", lambda p: p.train(flags=("--model-dir", "x"))),
    Case("`--load-epoch` without `--model-dir`", lambda p: p.train(flags=("--load-epoch", "1"))),
    Case("a seed that is no number", lambda p: p.train(flags=("--seed", "one"))),
    Case("a seed below -1", lambda p: p.train(flags=("--seed", "-5"))),
    Case("a seed beyond 32 bits", lambda p: p.train(flags=("--seed", "4294967296"))),
    Case("a GPU demanded where there is none", lambda p: p.train("USE_CUDA", "True"), words="none: "),
    # The configuration
    Case("a key misspelt", lambda p: p.train("OPTIM.LEARNING_RATE", "0.1")),
    Case("a value of another type", lambda p: p.train("OPTIM.LR", "fast")),
    Case("a value where a section is", lambda p: p.train("OPTIM", "adam")),
    Case("a value left blank in a config file", lambda p: p.config("OPTIM:\n  LR:\n")),
    Case("a value of None", lambda p: p.train("INPUT.SIZE", "None")),
    Case("a section that stands twice", lambda p: p.config("OPTIM:\n  LR: 0.1\nSEED: 1\nOPTIM:\n  NAME: sgd\n")),
    Case("a config file that is not there", lambda p: p.train(flags=("--config-file", str(p.folder / "no.yaml")))),
    Case("a config file that is not YAML", lambda p: p.config("SEED: [1"), words="but got: "),
    Case("one that is a list", lambda p: p.config("- SEED\n")),
    Case("one that is not text", lambda p: p.config(b"SEED: \xff\n"), words="but got: "),
    Case("one that asks for code to be run", lambda p: p.config("SEED: !!python/object/apply:os.getcwd []"),
         words="but got: "),
    Case("aliases that multiply", lambda p: p.config("\n".join([
        "a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]))),
    Case("brackets without end", lambda p: p.config("[" * 500)),
    Case("a `_BASE_` that leads back", lambda p: p.config("_BASE_: my.yaml\n")),
    Case("a `_BASE_` that is not there", lambda p: p.config("_BASE_: no.yaml\n"), words="but got: "),
    Case("a batch size of 0", lambda p: p.train("DATALOADER.TRAIN_X.BATCH_SIZE", "0")),
    Case("a negative number of workers", lambda p: p.train("DATALOADER.NUM_WORKERS", "-1")),
    Case("a negative number of epochs", lambda p: p.train("OPTIM.MAX_EPOCH", "-1")),
    Case("an optimizer that there is not", lambda p: p.train("OPTIM.NAME", "adamm")),
    Case("a schedule that there is not", lambda p: p.train("OPTIM.LR_SCHEDULER", "cosinus")),
    Case("a transform that there is not", lambda p: p.train("INPUT.TRANSFORMS", "('normalise',)")),
    Case("an image size that CLIP does not have", lambda p: p.train("INPUT.SIZE", "(32, 32)")),
    Case("an image size that is no pair of numbers", lambda p: p.train("INPUT.SIZE", "('a', 'b')")),
    Case("a standard deviation of zero", lambda p: p.train("INPUT.PIXEL_STD", "[0.3, 0.0, 0.3]")),
    Case("a crop larger than the image", lambda p: p.train("INPUT.RRCROP_SCALE", "(0.5, 2.0)")),
    Case("a split that there is not", lambda p: p.train("TEST.SPLIT", "train")),
    Case("a choice of the model that there is not", lambda p: p.train("TEST.FINAL_MODEL", "best_test")),
    Case("an answer to NaN that there is not", lambda p: p.train("TRAIN.ON_NAN", "ignore")),
    Case("a half that is none", lambda p: p.train("DATASET.SUBSAMPLE_CLASSES", "old")),
    Case("0 shots", lambda p: p.train("DATASET.NUM_SHOTS", "0")),
    Case("a prompt without a place for the name", lambda p: p.train("DATASET.TEMPLATE", "a photo")),
    Case("a number of a method out of its range", lambda p: p.train("TRAINER.CLIPADAPTER.RATIO", "1.5")),
    Case("a precision that there is not", lambda p: p.train("TRAINER.CLIPADAPTER.PREC", "fp8")),
    Case("an output folder below a file", lambda p: p.train("OUTPUT_DIR", p.file("file", "") + "/out")),
    Case("a run to resume that there is not", lambda p: p.train("RESUME", str(p.folder / "no")), late=True),
    # Weights and checkpoints
    Case("a backbone misspelt", lambda p: p.train("MODEL.BACKBONE.NAME", "ViT-B/61"), words="to be "),
    Case("weights that are not there", lambda p: p.train("MODEL.BACKBONE.WEIGHTS", str(p.folder / "no"))),
    Case("weights cut off", cut_weights),
    Case("weights that are something else", lambda p: clip_file(p, b"no weights at all")),
    Case("weights that would run code", lambda p: clip_file(p, hostile(p))),
    Case("a model folder without a model", lambda p: p.evaluate(p.folder)),
    Case("a checkpoint cut off", lambda p: with_checkpoint(p, lambda content: content[:1000]), words="but got"),
    Case("a checkpoint that would run code", lambda p: with_checkpoint(p, lambda content: hostile(p)), words="but "),
    Case("a checkpoint for another CLIP", other_weights, words="but got "),
    # Images and classes
    Case("no root", lambda p: [*p.train("DATASET.ROOT", "")]),
    Case("a root that is not there", lambda p: p.train(root=p.folder / "no")),
    Case("a root without class folders", lambda p: p.train(root=p.folder)),
    Case("a class of one image", few_photos),
    Case("parts of a split without train", lambda p: laid_out(p, "val", "test")),
    Case("parts of a split without classes", lambda p: laid_out(p, "Training", "Testing", flat=True)),
    Case("two folders for one part", lambda p: laid_out(p, "train", "Training", "test")),
    Case("the classes one folder deeper", lambda p: laid_out(p, "photos")),
    Case("photos without a dataset, and no photos", unnamed),
    Case("a link to an image that is not there", lambda p: linked_photos(p, "cat/gone.jpg")),
    Case("images of 32-bit integers", integer_photos, late=True),
    Case("class names too long for the prompt", long_names),
    Case("a run to go on with that was of other images", other_photos, late=True),
    Case("a class folder that is a broken link", linked_photos, words="but got: "),
    Case("images cut off", spoilt_photo, words="but got", late=True),
    Case("images 500 times as long as wide", long_photo, late=True),
    Case("a CSV without labels", lambda p: csv_of(p, "path,class\na.png,cat\n")),
    Case("a CSV with a column twice", lambda p: csv_of(p, "path,label,label\na.png,cat,dog\n")),
    Case("a CSV that leads out of its folder", lambda p: csv_of(p, "path,label\n../../etc/passwd,cat\n")),
    Case("a CSV with an image twice", lambda p: csv_of(p, "path,label\na.png,cat\na.png,dog\n")),
    Case("a CSV with a split that there is not", lambda p: csv_of(p, "path,label,split\na.png,cat,holdout\n")),
    Case("a CSV that is not CSV", lambda p: csv_of(p, 'path,label\n"a.png,cat\n'), words="but got: "),
    Case("a split file that is not JSON", lambda p: with_file(p, "split.json", "{"), words="but got: "),
    Case("a split file that leads out of its folder", lambda p: with_split(p, lambda s: swap(s["test"][0], 0, "../x"))),
    Case("a split file with an image in two parts", lambda p: with_split(p, lambda s: s["test"].append(s["train"][0])),
         words="but "),
    Case("a split file with a label left out", lambda p: with_split(p, lambda s: [
        swap(item, 1, item[1] + 1) for part in s.values() for item in part])),
    Case("class names that are no text", lambda p: with_file(p, "classes.json", '{"cat": 1}')),
    Case("class names that stand twice", lambda p: with_file(p, "classes.json", '{"cat": "a", "cat": "b"}')),
    Case("two classes of one name", lambda p: with_file(p, "classes.json", '{"cat": "pet", "dog": "Pet"}')),
    # Predictions
    Case("a folder that holds no run", lambda p: p.predict(run=p.folder), predict.main),
    Case("an image that is not there", lambda p: p.predict(image=str(p.folder / "no.png")), predict.main),
    Case("a folder without images", lambda p: p.predict(image=str(p.folder)), predict.main),
    Case("no class to show", lambda p: p.predict("--top-k", "0"), predict.main),
    Case("the same class name twice", lambda p: p.predict("--classes", "cat,dog,cat"), predict.main),
    Case("a head that the method has not", lambda p: p.predict("--head", "final"), predict.main),
    Case("an epoch that was not kept", lambda p: p.predict("--load-epoch", "7"), predict.main),
    Case("class names of the run that are none", lambda p: with_run(p, "classes.json", "{}"), predict.main),
    Case("a config of the run that is damaged", lambda p: with_run(p, "config.yaml", "SEED: ["), predict.main,
         words="but got: "),
    # Results
    Case("results that are no numbers", lambda p: numbers(p, "dataset,method,shots,accuracy\nDigits,CoOp,1,high\n"),
         plot_shots.main, words="accuracy but got "),
    Case("results with a column missing", lambda p: numbers(p, "dataset,method,shots\n"), plot_shots.main),
    Case("metrics of a run that are none",
         lambda p: runs_with(p, '{"trainer": 1, "dataset": "", "shots": 1, "seed": 1}'), report.main),
    Case("metrics of a run that are not JSON", lambda p: runs_with(p, "{"), report.main, words="but got: "),
    Case("no run to read", lambda p: [str(p.folder)], parse_results.main),
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory, random_tiny) -> tuple[Path, Path, Path]:
    """Photos, with their split; weights; and a finished run."""
    folder = tmp_path_factory.mktemp("shared")
    for number, name in enumerate(("cat", "dog")):
        for i in range(5):
            path = folder / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((64, 64), 30 + 40 * number).convert("RGB").save(path)
    place = Place(folder, folder / "photos", random_tiny, folder / "run")
    assert train.main([*place.train(), "OUTPUT_DIR", str(place.run)]) == 0
    return place.photos, random_tiny, place.run


@pytest.fixture(scope="module")
def messages() -> Iterator[dict[str, str]]:
    """What was said; with WRITE_TABLE, the table is written of it."""
    said: dict[str, str] = {}
    yield said
    if os.environ.get("WRITE_TABLE") and len(said) == len(CASES):
        rows = [f"| {case.what} | {cell(said[case.what])} |" for case in CASES]
        table = "\n".join([BEGIN, "| what is wrong | what is said |", "|---|---|", *rows, END])
        DOCS.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, DOCS.read_text(), flags=re.DOTALL))


def cell(message: str) -> str:
    return f"`{message}`".replace("|", "\\|")


def table() -> dict[str, str]:
    part = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line[2:-2].split(" | ", 1) for line in part.splitlines() if line.startswith("| ")][1:]
    return {what: message for what, message in rows}


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_one_line_says_what_is_wrong(case, shared, tmp_path, capsys, monkeypatch, messages):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    photos, weights, run = shared
    place = Place(tmp_path, photos, weights, run)
    argv = case.make(place)
    capsys.readouterr()
    try:
        code = case.program(argv)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2, said
    line = said.err.splitlines()[-1]
    if case.program is train.main:
        assert said.err.splitlines() == [line], said.err  # before any bar, warning or traceback
        assert case.late or len(said.out) < 4000  # and before the configuration and the system are told
    assert line.startswith("error: ") and "Traceback" not in said.err and line.isprintable()
    assert not (tmp_path / "trap").exists() and not (tmp_path / "out" / "metrics.json").exists()
    message = line.removeprefix("error: ").removesuffix(" (see --help)")
    for path, name in ((tmp_path, "..."), (photos.parent, "..."), (weights, "WEIGHTS"), (ROOT, ".")):
        message = message.replace(str(path), name)
    message = re.sub(r"digest [0-9a-f]{12}", "digest DIGEST", message)  # of noise, of which earlier tests have drawn
    message = re.sub(r"[0-9a-f]{64}", "SHA256", re.sub(r"one of (\w+, ){12,}\w+ ", "one of ... ", message))
    if case.words:
        before, found, _ = message.partition(case.words)
        assert found, message
        message = f"{before}{found.rstrip()} ..."
    messages[case.what] = message
    if not os.environ.get("WRITE_TABLE"):
        assert table()[case.what] == cell(message)


def test_the_table_has_these_cases():
    assert list(table()) == [case.what for case in CASES] and len(CASES) >= 40
