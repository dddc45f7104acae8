"""One's own images through train.py: whatever is wrong with them is one line, exit code 2, and no half-written file."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from error_lines import assert_one_line
from PIL import Image

from dlr_clip_cli.train import parse_args
from trainers.app import train
from trainers.app.configuration import setup_cfg

ROOT = Path(train.__file__).parents[2]
COLORS = {"cat": "red", "dog": "blue"}


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes in the layout train / val / test, four images of each in each part."""
    for part in ("train", "val", "test"):
        for name, color in COLORS.items():
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def start(tmp_path, random_tiny):
    def start(root: Path, *flags: str, output: str = "run") -> int:
        return train.main(
            [
                *("--root", str(root), "--dataset-config-file", str(ROOT / "configs/datasets/image_folder.yaml")),
                *("--trainer", "DLRCLIP", "--config-file", str(ROOT / "configs/trainers/dlr/tiny.yaml")),
                *("--seed", "-1", *flags),  # unseeded: seeded picks would be kept beside the photos
                *("--output-dir", str(tmp_path / output), "MODEL.BACKBONE.WEIGHTS", str(random_tiny)),
                *("OPTIM.MAX_EPOCH", "1", "USE_CUDA", "False"),
            ]
        )

    return start


def listing(folder: Path) -> list[str]:
    return sorted(os.fsdecode(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)


def spoil(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    if kind == "wide":
        Image.new("L", (50_000, 30)).save(path)
    elif kind == "loop":
        path.unlink()
        path.symlink_to(path)
    else:
        path.write_bytes({"empty": b"", "text": b"Dear diary", "truncated": whole[: len(whole) // 2]}[kind])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "an empty file"),
        ("text", "no known image format"),
        ("truncated", ""),
        ("wide", "50000 x 30 pixels"),
        ("loop", "Too many levels"),
    ],
)
def test_an_unreadable_image_is_named(start, photos, tmp_path, capsys, kind, reason):
    bad = photos / "test" / "dog" / "2.png"
    spoil(bad, kind)
    before = listing(photos)
    assert start(photos, "--eval-only") == 2
    assert_one_line(capsys.readouterr().err, str(bad), reason)
    assert listing(photos) == before
    left = {Path(path).name for path in listing(tmp_path / "run")}
    assert left <= {"log.txt", "config.yaml", "classes.json", "environment.json"}  # no result, no DONE, no .tmp


def test_all_of_them_are_skipped_on_demand(start, photos, tmp_path):
    for number, kind in enumerate(("empty", "text", "truncated", "wide")):
        spoil(photos / ("train", "val", "test", "test")[number] / "dog" / f"{number}.png", kind)
    assert start(photos, "--skip-bad-images") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["bad_images"] == 4 and metrics["test"]["n"] == 6
    listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [
        str(photos / part / "dog" / f"{number}.png") for number, part in enumerate(("train", "val", "test", "test"))
    ]


def empty_class(root: Path) -> None:
    (root / "train" / "owl").mkdir()


def odd_name(root: Path) -> None:
    os.makedirs(os.fsencode(root) + b"/train/caf\xe9")


def circle(root: Path) -> None:
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")


def twins(root: Path) -> None:
    shutil.copytree(root / "train" / "dog", root / "train" / "DOG")


def unknown_class(root: Path) -> None:
    (root / "test" / "dog").rename(root / "test" / "dogs")


def few(root: Path) -> None:
    for part in ("val", "test"):
        shutil.rmtree(root / part)
    for name in COLORS:
        (root / "train" / name).rename(root / name)
    (root / "train").rmdir()
    for number in range(2):
        (root / "dog" / f"{number}.png").unlink()


def one_class(root: Path) -> None:
    for part in ("train", "val", "test"):
        shutil.rmtree(root / part / "dog")


def wrong_names(root: Path) -> None:
    (root / "classes.txt").write_text("cats Katze\n")


def gone(root: Path) -> None:
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (empty_class, ["train/owl", "nothing"]),
        (odd_name, ["UTF-8", r"caf\xe9"]),
        (circle, ["cat/again", "leads back"]),
        (twins, ["DOG", "dog", "tell apart"]),
        (unknown_class, ["test", '"dogs"', 'did you mean "dog"']),
        (few, ["at least 4 images", "dog (2)"]),
        (one_class, ["two classes", "1"]),
        (wrong_names, ["classes.txt", "cats", "cat, dog"]),
        (gone, ["photos", "not there"]),
    ],
)
def test_wrong_folders(start, photos, tmp_path, capsys, harm, words):
    harm(photos)
    before = listing(photos)
    assert start(photos) == 2
    assert_one_line(capsys.readouterr().err, *words)
    assert listing(photos) == before and not (tmp_path / "run").exists()


def test_a_trained_model_may_be_evaluated_on_other_classes(start, photos, tmp_path):
    assert start(photos) == 0
    for part in ("train", "val", "test"):
        (photos / part / "dog").rename(photos / part / "owl")
    assert start(photos, "--eval-only", "--model-dir", str(tmp_path / "run"), output="other") == 0
    metrics = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert metrics["test"]["heads"]["glr"] == metrics["test"]["heads"]["clip"]  # no refiner for new classes
    assert json.loads((tmp_path / "other" / "classes.json").read_text()) == ["cat", "owl"]


def recolor(root: Path, side: int) -> None:
    """Other images under the same names."""
    for path in root.rglob("*.png"):
        Image.effect_noise((side, side), 50).convert("RGB").save(path)


def test_a_stopped_run_does_not_go_on_with_other_images_of_the_same_names(start, photos, tmp_path, capsys):
    """Neither when the command is given again, nor when it is told where to resume from."""
    assert start(photos) == 0
    (tmp_path / "run" / "DONE").unlink()
    shutil.copytree(photos, tmp_path / "copy")  # moved elsewhere it is the same data
    other = Path(shutil.copytree(photos, tmp_path / "other"))
    recolor(other, 48)
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    capsys.readouterr()
    assert start(other) == 2
    assert_one_line(capsys.readouterr().err, "other images, labels or parts", "--output-dir")
    assert start(other, "--resume", str(tmp_path / "run"), "--force-resume", output="second") == 2
    assert_one_line(capsys.readouterr().err, "other images, labels or parts")
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    assert start(tmp_path / "copy") == 0


def test_photos_without_a_dataset_are_ones_own_and_nothing_is_written_among_them(photos, random_tiny, tmp_path, capsys):
    before = listing(photos)
    command = [
        "--root",
        str(photos),
        "--trainer",
        "ZeroshotCLIP",
        "--seed",
        "-1",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    command += ["--config-file", str(ROOT / "configs/trainers/zeroshot/tiny.yaml")]
    command += ["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", "False"]
    assert train.main(command) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["dataset"], metrics["test"]["n"]) == ("ImageFolder", 8) and listing(photos) == before
    said = capsys.readouterr().out
    assert f"\n{photos.name}: " in said
    assert "Images in" in said
    for name in ("Digits", "Shapes"):  # those that this project makes never go where photos are
        assert train.main([*command[:-4], "--dry-run", *command[-4:], "DATASET.NAME", name]) == 0
        assert listing(photos) == before


@pytest.mark.parametrize("trainer", ["imo", "imodino"])
def test_a_trainers_file_does_not_choose_another_dataset(trainer, photos):
    named = ["--dataset-config-file", str(ROOT / "configs/datasets/image_folder.yaml")]
    command = ["--trainer", {"imo": "IMO", "imodino": "IMODINO"}[trainer], "--root", str(photos), "--output-dir", "x"]
    command += ["--config-file", str(ROOT / f"configs/trainers/{trainer}/tiny.yaml")]
    assert setup_cfg(parse_args([*command, *named])).DATASET.NAME == "ImageFolder"
    assert setup_cfg(parse_args(command)).DATASET.NAME == "ShapesGeneric"


def test_the_log_is_of_the_run_that_metrics_are_of(start, photos, tmp_path):
    assert start(photos) == 0
    run = tmp_path / "run"
    first = (run / "log.txt").read_text()
    assert start(photos) == 0  # again, in the same folder
    logs = sorted(path.name for path in run.glob("log.txt*"))
    assert len(logs) == 2 and (run / logs[1]).read_text() == first
    second = (run / "log.txt").read_text()
    assert "Finish training" in second and second != first
    assert start(photos, "--eval-only", "--model-dir", str(run)) == 0  # beside it: the training run's log stays
    assert (run / "log.txt").read_text() == second and len(list(run.glob("log.txt*"))) == 3
    assert start(photos, "--skip-bad-images") == 2  # a run that is refused does not take its place either
    wrong_names(photos)
    assert start(photos) == 2
    assert (run / "log.txt").read_text() == second


def test_the_command_that_shows_curves_can_be_pasted(start, photos, tmp_path, capsys):
    output = "my run (2) & more"
    assert start(photos, output=output) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "tensorboard --logdir" in line)
    assert shlex.split(line.partition(": ")[2]) == ["tensorboard", "--logdir", str(tmp_path / output / "tensorboard")]


def test_shots_asked_for_and_images_found_are_both_told(start, photos, tmp_path):
    (photos / "train" / "dog" / "3.png").unlink()
    assert start(photos) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["shots"] == 16
    assert metrics["train_images"] == {"total": 7, "fewest_per_class": 3, "most_per_class": 4}
