"""From a folder of images to a classifier and its predictions on new ones, through the two command lines."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from error_lines import assert_one_line
from PIL import Image, features
from programs import run_program

from dassl.engine import TRAINER_REGISTRY
from dassl.utils import close_logger
from datasets.rendering import Style, compose, outline_mask
from dlr_clip_cli.train import parse_args
from trainers.app import predict, train
from trainers.app.building import build

ROOT = Path(predict.__file__).parents[2]
# Two words each, as people name folders; easily told apart, also by a CLIP that has learnt nothing.
CLASSES = {
    "blue square": ("square", "blue"),
    "green star": ("five-pointed star", "green"),
    "red circle": ("circle", "red"),
}


def draw(folder: Path, name: str, count: int, seed: int) -> None:
    shape, color = CLASSES[name]
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        mask = outline_mask(shape, rng, scale=(0.6, 0.9))
        style = Style(color=color, background="white", texture="plain", noise=0.03)
        Image.fromarray(compose(mask, style, rng)).resize((96, 64)).save(folder / f"{number:02d}.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "my_photos"
    for seed, name in enumerate(CLASSES):
        draw(folder / name, name, 20, seed)
    return folder


@pytest.fixture(scope="module")
def run(photos, tiny_weights) -> Path:
    """The second of the three commands (the first installs): its output folder. The photos are taken away then."""
    folder = photos.parent / "run"
    code = train.main(
        [
            *("--root", str(photos), "--dataset-config-file", str(ROOT / "configs/datasets/image_folder.yaml")),
            *("--trainer", "DLRCLIP", "--config-file", str(ROOT / "configs/trainers/dlr/tiny.yaml"), "--seed", "1"),
            *("--output-dir", str(folder), "MODEL.BACKBONE.WEIGHTS", tiny_weights, "OPTIM.MAX_EPOCH", "50"),
            *("USE_CUDA", "False"),
        ]
    )
    assert code == 0
    shutil.move(photos, photos.with_name("elsewhere"))
    return folder


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> Path:
    """New photos, four of each class, in folders called like the classes."""
    folder = tmp_path_factory.mktemp("new")
    for seed, name in enumerate(CLASSES):
        draw(folder / name, name, 4, 100 + seed)
    return folder


def test_three_commands_reach_a_sensible_accuracy(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["n"] == 18 and metrics["accuracy"] >= 90
    assert json.loads((run / "classes.json").read_text()) == list(CLASSES)


def test_new_files_are_predicted(run, new, tmp_path, capsys):
    assert predict.main(["--model-dir", str(run), str(new), "--json", "--output", str(tmp_path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["classes"] == list(CLASSES) and answer["head"] == "final" and answer["unreadable"] == []
    assert len(answer["images"]) == 12
    right = 0
    for image in answer["images"]:
        guesses = image["predictions"]
        assert [guess["class"] for guess in guesses] == [answer["classes"][guess["index"]] for guess in guesses]
        probabilities = [guess["probability"] for guess in guesses]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1, abs=1e-5)
        right += guesses[0]["class"] == Path(image["path"]).parent.name
    assert right >= 11
    lines = (tmp_path / "result.txt").read_text().splitlines()
    assert lines[0].startswith("blue square/00.jpg ") and len(lines) == 12
    for line, image in zip(lines, answer["images"], strict=True):
        assert [int(word) for word in line.split()[-3:]] == [guess["index"] for guess in image["predictions"]]


def test_the_third_level_predicts_without_its_training_images(photos, run, new, tiny_weights, tmp_path, capsys):
    """Nothing is trained in this run; its checkpoint holds the prototypes and the mixture."""
    elsewhere = photos.with_name("elsewhere")
    code = train.main(
        [
            *("--root", str(elsewhere), "--dataset-config-file", str(ROOT / "configs/datasets/image_folder.yaml")),
            *(
                "--trainer",
                "DLRCLIP",
                "--config-file",
                str(ROOT / "configs/trainers/dlr/tiny_plus.yaml"),
                "--seed",
                "1",
            ),
            *("--output-dir", str(tmp_path / "free"), "MODEL.BACKBONE.WEIGHTS", tiny_weights, "USE_CUDA", "False"),
            *("TRAINER.DLRCLIP.CMA", "False", "TRAINER.DLRCLIP.GLR", "False"),
        ]
    )
    assert code == 0
    accuracy = json.loads((tmp_path / "free" / "metrics.json").read_text())["accuracy"]
    split = json.loads((elsewhere / "split.json").read_text())
    paths = [str(elsewhere / item[0]) for item in split["test"]]
    capsys.readouterr()
    assert predict.main(["--model-dir", str(tmp_path / "free"), *paths, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    guesses = [image["predictions"][0]["index"] for image in answer["images"]]
    assert answer["head"] == "mixed"
    assert 100 * np.mean([g == item[1] for g, item in zip(guesses, split["test"], strict=True)]) == accuracy >= 90


def test_it_agrees_with_the_run(run, photos, capsys):
    """The images of the run's own test set, predicted one by one and in a batch, give the accuracy of its records."""
    split = json.loads((photos.with_name("elsewhere") / "split.json").read_text())
    paths = [str(photos.with_name("elsewhere") / item[0]) for item in split["test"]]
    assert predict.main(["--model-dir", str(run), *paths, "--json", "--batch-size", "5"]) == 0
    guesses = [image["predictions"][0]["index"] for image in json.loads(capsys.readouterr().out)["images"]]
    accuracy = 100 * np.mean([guess == item[1] for guess, item in zip(guesses, split["test"], strict=True)])
    assert accuracy == pytest.approx(json.loads((run / "metrics.json").read_text())["accuracy"])


def test_table_and_csv(run, new, capsys):
    image = str(new / "red circle" / "00.jpg")
    assert predict.main(["--model-dir", str(run), image, "--top-k", "2"]) == 0
    captured = capsys.readouterr()
    header, _, row = captured.out.splitlines()
    assert header.split() == ["image", "1", "2"] and re.match(r"00\.jpg +red circle \d+\.\d %  ", row)
    assert str(run / "predictions" / "result.txt") in captured.err
    assert (run / "predictions" / "result.txt").read_text().startswith("00.jpg 2 ")

    assert predict.main(["--model-dir", str(run), image, "--top-k", "9", "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert list(row)[:3] == ["path", "class_1", "probability_1"] and len(row) == 7
    assert (row["path"], row["class_1"]) == (image, "red circle") and float(row["probability_1"]) > 1 / 3


def test_bad_files_are_reported_and_the_rest_go_on(run, new, tmp_path, capsys):
    Image.new("CMYK", (70, 70)).save(tmp_path / "good.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "zero.png").touch()
    whole = (new / "red circle" / "00.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (50_000, 20)).save(tmp_path / "wide.png")
    (tmp_path / "notes.txt").write_text("not looked at in a folder")
    (tmp_path / "empty").mkdir()
    argv = ["--model-dir", str(run), str(tmp_path), str(tmp_path / "empty"), str(tmp_path / "absent.jpg"), "--json"]
    assert predict.main([*argv, "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert [Path(image["path"]).name for image in answer["images"]] == ["good.jpg"]
    bad = ["empty", "half.jpg", "text.jpg", "wide.png", "zero.png", "absent.jpg"]
    assert [Path(entry["path"]).name for entry in answer["unreadable"]] == bad
    assert all(f"{name}" in captured.err for name in bad) and "1 images predicted, 6 skipped" in captured.err
    assert len((tmp_path / "out" / "result.txt").read_text().splitlines()) == 1


def test_other_class_names(run, new, tmp_path, capsys):
    argv = ["--model-dir", str(run), str(new / "red circle"), "--json", "--output", str(tmp_path)]
    assert predict.main([*argv, "--classes", 'circle, "square, or box" ,star,triangle']) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["classes"] == ["circle", "square, or box", "star", "triangle"]
    assert len(answer["images"]) == 4 and len(answer["images"][0]["predictions"]) == 4
    # Some of the classes trained on: their columns of the trained classifier, in the order asked for.
    assert predict.main([*argv, "--classes", "red circle,blue square"]) == 0
    part = json.loads(capsys.readouterr().out)["images"][0]["predictions"]
    assert predict.main(argv) == 0
    full = {guess["class"]: guess for guess in json.loads(capsys.readouterr().out)["images"][0]["predictions"]}
    odds = part[0]["probability"] / part[1]["probability"]
    assert odds == pytest.approx(full["red circle"]["probability"] / full["blue square"]["probability"], rel=1e-3)
    assert part[0] == {"class": "red circle", "index": 0, "probability": pytest.approx(part[0]["probability"])}


def test_another_head(run, new, capsys):
    argv = ["--model-dir", str(run), str(new / "red circle" / "00.jpg"), "--json"]
    assert predict.main([*argv, "--head", "clip"]) == 0
    assert json.loads(capsys.readouterr().out)["head"] == "clip"
    assert predict.main([*argv, "--head", "clap"]) == 2
    assert_one_line(capsys.readouterr().err, "clap", 'did you mean "clip"', "fused")


@pytest.mark.parametrize("name", TRAINER_REGISTRY.registered_names())
def test_every_trainer_predicts_without_its_images(name, tmp_path, random_tiny, random_adapters, capsys, monkeypatch):
    """Built on Digits, saved, and used again where Digits are gone."""
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), "red").save(image)
    folder = tmp_path / "run"
    args = parse_args(
        [
            *("--trainer", name, "--seed", "1", "--output-dir", str(folder), "MODEL.BACKBONE.NAME", "tiny"),
            *("MODEL.BACKBONE.WEIGHTS", str(random_tiny), "INPUT.SIZE", "(64, 64)", "DATASET.NUM_SHOTS", "1"),
            *("INPUT.TRANSFORMS", "('normalize',)", "DATALOADER.NUM_WORKERS", "0", "USE_CUDA", "False"),
            *("OPTIM.NAME", "adamw", "OPTIM.MAX_EPOCH", "1"),
            *(("MODEL.IMO_WEIGHTS", str(random_adapters)) if TRAINER_REGISTRY.get(name).adapters == "needed" else ()),
        ]
    )
    trainer = build(args)
    trainer.call_hooks("start")
    trainer.save_model(0, str(folder))
    close_logger()
    if not getattr(type(trainer), "needs_training_images", False):
        monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "nothing here"))
    capsys.readouterr()
    assert predict.main(["--model-dir", str(folder), str(image), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    assert len(found["predictions"]) == 5 and not (tmp_path / "nothing here").exists()


def test_a_bug_while_the_model_is_built_shows_its_traceback(run, new, monkeypatch):
    monkeypatch.setattr(TRAINER_REGISTRY.get("DLRCLIP"), "build_model", lambda self: {}["CTX"])
    with pytest.raises(KeyError, match="CTX"):
        predict.main(["--model-dir", str(run), str(new)])


def test_a_run_without_class_names_needs_its_images(run, new, photos, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "classes.json").unlink()
    argv = ["--model-dir", str(copy), str(new / "red circle" / "00.jpg"), "--json"]
    assert predict.main(argv) == 2
    assert_one_line(capsys.readouterr().err, str(photos), "not there")
    argv += ["--set", "DATASET.ROOT", str(photos.with_name("elsewhere"))]
    assert predict.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["predictions"][0]["class"] == "red circle"


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{image}"], ["--model-dir"]),
        (["--model-dir", "{run}"], ["IMAGE_OR_FOLDER"]),
        (["--model-dir", "/nowhere", "{image}"], ["/nowhere/config.yaml"]),
        (["--model-dir", "{run}", "{image}", "--load-epoch", "99"], ["model.pth.tar-99"]),
        (["--model-dir", "{run}", "{image}", "--classes", "a,,b"], ["--classes", "a,,b"]),
        (["--model-dir", "{run}", "{image}", "--classes", "a,a"], ["--classes", "a,a"]),
        (["--model-dir", "{run}", "{image}", "--classes", ""], ["--classes"]),
        (["--model-dir", "{run}", "{image}", "--top-k", "0"], ["--top-k", "0"]),
        (["--model-dir", "{run}", "{image}", "--json", "--csv"], ["--csv", "--json"]),
        (["--model-dir", "{run}", "{image}", "--set", "MODEL.BACKBON.NAME", "x"], ["BACKBON", "did you mean"]),
        (["--model-dir", "{run}", "{image}", "--output", "{image}"], ["result.txt", "--output"]),
        (["--model-dir", "{run}", "/nowhere.jpg"], ["none of 1"]),
        (["--model-dir", "{run}", "{empty}"], ["images", "none"]),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(run, new, tmp_path, capsys, argv, words):
    (tmp_path / "empty").mkdir()
    places = {"{image}": new / "red circle" / "00.jpg", "{run}": run, "{empty}": tmp_path / "empty"}
    before = sorted(run.rglob("*"))
    try:
        code = predict.main([str(places.get(word, word)) for word in argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert_one_line(capsys.readouterr().err, *words)
    assert sorted(run.rglob("*")) == before or "result.txt" in words


def test_spoilt_runs_are_named(run, new, tmp_path, capsys):
    image = str(new / "red circle" / "00.jpg")
    for name, content in (
        ("config.yaml", b"DATASET: ["),
        ("config.yaml", b"NOTHING: 1"),
        ("classes.json", b"[1]"),
        ("classes.json", b"["),
        ("dlrclip/model.pth.tar-50", b"nothing of the kind"),
        ("dlrclip/checkpoint", b"model.pth.tar-3\n"),
    ):
        shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
        assert predict.main(["--model-dir", str(tmp_path / "copy"), image]) == 2
        assert_one_line(capsys.readouterr().err, Path(name).name)


def test_stdout_may_be_closed_early(run, new, tmp_path):
    command = f'"{sys.executable}" "{ROOT / "predict.py"}" --model-dir "{run}" "{new}" --json | head -1'
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "{\n" and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_as_a_program(run, new, tmp_path):
    done = run_program([ROOT / "predict.py", "--model-dir", run, new, "--csv"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(csv.DictReader(io.StringIO(done.stdout)))) == 12
    assert "Traceback" not in done.stderr


def test_folders_are_searched_as_in_training(run, new, tmp_path, capsys):
    """Linked folders and all kinds of images count, what systems leave does not, and other kinds are named."""
    folder = tmp_path / "mixed"
    (folder / "@eaDir" / "a.jpg").mkdir(parents=True)
    image = Image.open(new / "red circle" / "00.jpg")
    for name in ("a.jfif", "b.jpe"):
        image.save(folder / name, "JPEG")
    third = "c.avif" if features.check("avif") else "c.webp"  # older versions of Pillow know no AVIF
    image.save(folder / third)
    image.save(folder / "@eaDir" / "a.jpg" / "SYNOPHOTO_THUMB_XL.jpg")
    (folder / "phone.heic").write_bytes(b"x")
    (folder / "linked").symlink_to(new / "green star")
    assert predict.main(["--model-dir", str(run), str(folder), "--json", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    names = [Path(found["path"]).relative_to(folder).as_posix() for found in json.loads(captured.out)["images"]]
    assert names == ["a.jfif", "b.jpe", third, *(f"linked/{number:02d}.jpg" for number in range(4))]
    assert "left out, no images of a known kind" in captured.err and ".heic (1); convert .heic to JPEG" in captured.err
    (folder / "circle").symlink_to(folder)
    assert predict.main(["--model-dir", str(run), str(folder)]) == 2 and "without loops" in capsys.readouterr().err


def test_a_console_that_is_not_utf8(run, new, tmp_path):
    photo = tmp_path / "\u732b caf\u00e9.jpg"
    shutil.copy(new / "red circle" / "00.jpg", photo)
    command = [sys.executable, str(ROOT / "predict.py"), "--model-dir", str(run), str(photo), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, cwd=ROOT)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    assert rb"\u732b caf\xe9.jpg" in result.stdout
    assert "\u732b caf\u00e9.jpg" in (tmp_path / "result.txt").read_text(encoding="utf-8")
