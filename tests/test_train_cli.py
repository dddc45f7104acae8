"""The command line: precedence, output folders, errors as one line, and a whole run from start to results."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import error_lines
import pytest
import torch
from programs import run_program

from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError, errors
from dlr_clip_cli.train import parse_args
from trainers.app import train
from trainers.app.configuration import setup_cfg

ROOT = Path(train.__file__).parents[2]
CONFIG = "configs/trainers/dlr/tiny.yaml"
TRAINER = "DLRCLIP"


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def command(tiny_weights, tmp_path):
    """Arguments of a run of seconds; more may be appended (flags in `extra` come before the pairs)."""

    def command(*extra: str, pairs: tuple[str, ...] = (), output: str | None = "run") -> list[str]:
        where = [] if output is None else ["--output-dir", str(tmp_path / output)]
        return [
            *("--trainer", TRAINER, "--config-file", CONFIG, "--seed", "1", *where, *extra),
            *("MODEL.BACKBONE.WEIGHTS", tiny_weights, "DATASET.NUM_SHOTS", "1", "OPTIM.MAX_EPOCH", "1"),
            *("DATALOADER.NUM_WORKERS", "0", "USE_CUDA", "False", *pairs),
        ]

    return command


def cfg_of(*argv: str):
    return setup_cfg(parse_args(list(argv)))


# -------------------------------------------------------------------------------------------------- configuration


def test_later_sources_win(tmp_path):
    (tmp_path / "dataset.yaml").write_text("SEED: 5\nDATASET:\n  NAME: Digits\n  NUM_SHOTS: 2\nOPTIM:\n  LR: 0.5\n")
    (tmp_path / "trainer.yaml").write_text(f"SEED: 6\nDATASET:\n  NUM_SHOTS: 3\nTRAINER:\n  NAME: {TRAINER}\n")
    files = ["--dataset-config-file", str(tmp_path / "dataset.yaml"), "--config-file", str(tmp_path / "trainer.yaml")]
    cfg = cfg_of(*files, "--output-dir", "x")
    assert (cfg.SEED, cfg.DATASET.NUM_SHOTS, cfg.OPTIM.LR, cfg.TRAINER.NAME) == (6, 3, 0.5, TRAINER)
    cfg = cfg_of(*files, "--output-dir", "x", "--seed", "7", "DATASET.NUM_SHOTS", "4")
    assert (cfg.SEED, cfg.DATASET.NUM_SHOTS) == (7, 4)
    assert cfg_of(*files, "--output-dir", "x", "--seed", "7", "SEED", "8").SEED == 8


def test_zero_is_a_seed_and_a_missing_flag_changes_nothing(tmp_path):
    (tmp_path / "trainer.yaml").write_text("SEED: 6\n")
    files = ["--trainer", TRAINER, "--config-file", str(tmp_path / "trainer.yaml"), "--output-dir", "x"]
    assert cfg_of(*files, "--seed", "0").SEED == 0
    assert cfg_of(*files).SEED == 6
    assert cfg_of("--trainer", TRAINER).SEED == -1


def test_every_flag_sets_its_key():
    cfg = cfg_of(
        *("--root", "r", "--output-dir", "o", "--resume", "s", "--seed", "3", "--trainer", TRAINER),
        *("--source-domains", "a", "b", "--target-domains", "c", "--transforms", "normalize"),
        *("--backbone", "RN50", "--head", "mlp", "DATASET.NAME", "EuroSAT"),
    )
    assert (cfg.DATASET.ROOT, cfg.OUTPUT_DIR, cfg.RESUME, cfg.SEED) == ("r", "o", "s", 3)
    assert (cfg.DATASET.SOURCE_DOMAINS, cfg.DATASET.TARGET_DOMAINS) == (("a", "b"), ("c",))
    assert (cfg.INPUT.TRANSFORMS, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.HEAD.NAME) == (("normalize",), "RN50", "mlp")
    assert cfg.is_frozen()


def test_without_a_dataset_it_is_digits():
    assert cfg_of("--trainer", TRAINER).DATASET.NAME == "Digits"


def test_a_short_name_means_the_trainer_s_own_file():
    short, long = (cfg_of("--trainer", TRAINER, *flags) for flags in (("--config", "tiny"), ("--config-file", CONFIG)))
    assert short == long  # the output folder, which is called after the file, too
    assert "/tiny_" in short.OUTPUT_DIR


def test_a_file_of_another_trainer_is_taken_with_a_warning(command, caplog):
    assert train.main(command("--dry-run", "--trainer", "ZeroshotCLIP")) == 0
    said = [message for message in caplog.messages if "is a configuration of" in message]
    assert said == [f"{CONFIG} is a configuration of {TRAINER} but is used with ZeroshotCLIP"]
    caplog.clear()
    assert train.main(command("--dry-run")) == 0
    assert not any("is a configuration of" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "file",
    [
        *(ROOT / program for program in ("train.py", "predict.py")),
        *(path for place in ("dlr_clip_cli", "trainers/app") for path in sorted((ROOT / place).glob("*.py"))),
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_the_command_line_knows_no_method(file):
    words = set(re.findall(r"\w+", file.read_text().lower()))  # "comma" is not MMA
    assert [name for name in TRAINER_REGISTRY.registered_names() if name.lower() in words] == []


@pytest.mark.parametrize("program", ["train.py", "predict.py"])
def test_the_programs_are_thin(program):
    assert len((ROOT / program).read_text().splitlines()) < 80


# ---------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("program, code", [("train.py", 0), ("predict.py", 0), ("train.py", 2), ("predict.py", 2)])
def test_help_and_wrong_flags_come_without_the_imports_that_take_seconds(program, code):
    flag = "--help" if code == 0 else "--no-such-flag"
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['{program}', '{flag}']\n"
        "try:\n"
        f"    runpy.run_path('{program}', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'open_clip', 'torchvision'} & set(sys.modules)\n"
        "    print('imported:', heavy or 'none')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stdout.endswith("imported: none\n"), done
    if program == "train.py" and code == 0:
        listed = re.search(r"^Trainers: ([^.]*)\.$", done.stdout, re.MULTILINE)
        assert sorted(re.split(r",\s+", listed[1])) == sorted(TRAINER_REGISTRY.registered_names())


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--trainer", TRAINER, "--dataset", "configs/datasets/digits.yaml"])
    assert stop.value.code == 2
    assert_one_line(capsys.readouterr().err, "unrecognized arguments: --dataset")


def test_no_command_line_abbreviates_flags():
    """Each argparse.ArgumentParser says so; the class Parser sees to it for those that it makes."""
    calls = [
        (path, call)
        for path in [
            *ROOT.glob("*.py"),
            *(
                p
                for f in ("scripts", "benchmarks", "dassl", "dlr_clip_cli", "trainers")
                for p in (ROOT / f).rglob("*.py")
            ),
        ]
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("argparse.ArgumentParser", "ArgumentParser")
    ]
    assert len(calls) > 10
    assert [path for path, call in calls if "allow_abbrev=False" not in ast.unparse(call)] == []


# ------------------------------------------------------------------------------------------------- output folders


def test_default_output_folder_is_new_or_a_run_that_was_cut_short(tmp_path, monkeypatch):
    config = str(ROOT / CONFIG)
    monkeypatch.chdir(tmp_path)
    argv = ("--trainer", TRAINER, "--config-file", config, "--seed", "2", "DATASET.NUM_SHOTS", "4")
    parent = Path("output/digits") / TRAINER / "tiny_4shots"
    cfg = cfg_of(*argv)
    assert Path(cfg.OUTPUT_DIR) == parent / "seed2"
    (parent / "seed2").mkdir(parents=True)
    (parent / "seed2" / "config.yaml").write_text(cfg.dump())
    assert Path(cfg_of(*argv).OUTPUT_DIR) == parent / "seed2"  # cut short: goes on there
    assert Path(cfg_of(*argv, "OPTIM.LR", "0.5").OUTPUT_DIR) == parent / "seed2-2"  # another run's folder
    (parent / "seed2" / "DONE").touch()
    assert Path(cfg_of(*argv).OUTPUT_DIR) == parent / "seed2-2"  # finished: left alone
    assert cfg_of(*argv, "OUTPUT_DIR", "mine").OUTPUT_DIR == "mine"


def test_default_output_folder_tells_halves_shots_and_evaluations_apart():
    assert cfg_of("--trainer", TRAINER).OUTPUT_DIR.endswith(f"output/digits/{TRAINER}/default_full/seed-1")
    pairs = ("--trainer", TRAINER, "--dataset-config-file", "configs/datasets/digits.yaml")
    assert "digits_base/" in cfg_of(*pairs, "DATASET.SUBSAMPLE_CLASSES", "base").OUTPUT_DIR
    assert cfg_of(*pairs, "--eval-only").OUTPUT_DIR.startswith(f"output/evaluation/{TRAINER}/default_full/digits/")


# ---------------------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_everything_and_can_be_evaluated_again(command, tmp_path, capsys):
    assert train.main(command()) == 0
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["trainer"], metrics["dataset"], metrics["shots"], metrics["seed"]) == (TRAINER, "Digits", 1, 1)
    assert metrics["test"]["n"] == 540
    assert list(metrics["test"]["heads"]) == ["clip", "cma", "glr", "final", "fused"]
    assert metrics["accuracy"] == metrics["test"]["heads"]["final"]["accuracy"]
    assert metrics["params"]["trainable"] > 0
    for name in ("config.yaml", "environment.json", "DONE", "log.txt"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events*"))
    log = (run / "log.txt").read_text()
    assert "Setting fixed seed: 1" in log and str(run) in log
    # What CoOp's result parser looks for: armed by "Finish training", the last match wins.
    after = log[log.index("\nFinish training\n") :]
    printed = re.findall(r"\* accuracy: ([\d.eE+-]+)%", after)[-1]
    assert float(printed) == pytest.approx(metrics["accuracy"], abs=0.051)
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 40 < len(log.splitlines()) and all(line in log for line in said.splitlines())
    before = said[: said.index("\nElapsed: ")].splitlines()
    assert len(before) < 25 and "Digits: 10 classes; images: 10 training, 10 validation, 540 test" in before
    assert "TRAINER.NAME DLRCLIP" in " ".join(said.split()) and "Building transform_train" not in said

    assert train.main(command("--eval-only", "--model-dir", str(run), "--load-epoch", "1", output="again")) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["test"] == metrics["test"]


@pytest.mark.parametrize("flag", ["--quiet", "--verbose"])
def test_the_console_may_have_less_or_all(flag, command, tmp_path, capsys):
    """And warnings stand at the end again."""
    assert train.main(command(flag, "--trainer", "ZeroshotCLIP")) == 0  # with the YAML of another trainer
    said, log = capsys.readouterr(), (tmp_path / "run" / "log.txt").read_text()
    if flag == "--quiet":
        assert "clip (main)" in said.out and "Digits:" not in said.out and said.err == ""
    else:
        assert set(log.splitlines()) <= set(said.out.splitlines()) and "Building transform_test" in said.out
    warning = next(line for line in log.splitlines() if "dlr" in line and "ZeroshotCLIP" in line)
    assert f"Warnings of this run:\n* {warning}" in log and warning in said.out


def test_the_same_command_twice_gives_the_same_numbers(command, tmp_path):
    for output in ("first", "second"):
        assert train.main(command(output=output)) == 0
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("first", "second"))
    for key in ("accuracy", "test", "selected", "params", "train"):
        assert json.dumps(first[key]) == json.dumps(second[key]), key
    assert first["train"]["loss"] > 0


def test_dry_run_builds_everything_and_saves_nothing(command, tmp_path, capsys):
    assert train.main(command("--dry-run")) == 0
    assert "OK" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_no_train_builds_only(command, tmp_path):
    assert train.main(command("--no-train")) == 0
    assert not (tmp_path / "run" / "metrics.json").exists()


# -------------------------------------------------------------------------------------------------------- errors


def assert_one_line(stderr: str, *words: str) -> None:
    error_lines.assert_one_line(stderr, *words)
    assert stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("flags", "pairs", "words"),
    [
        (["--trainer", "DLRCLOP"], [], ["DLRCLOP", "did you mean", "DLRCLIP"]),
        ([], ["TRAINER.NAME", ""], ["--trainer", "DLRCLIP"]),
        ([], ["DATASET.NAME", "Digit"], ["Digit", "did you mean", "Digits"]),
        ([], ["DATASET.NAME", "ShapesV2"], ["ShapesV2", "test images only", "--eval-only"]),
        ([], ["OPTIM.NAME", "adamx"], ["adamx", "did you mean"]),
        ([], ["DATASET.NUM_SHOT", "1"], ["NUM_SHOT", "did you mean", "NUM_SHOTS"]),
        ([], ["OPTIM.LR", "fast"], ["OPTIM.LR", "fast"]),
        ([], ["OPTIM.LR"], ["KEY VALUE", "OPTIM.LR"]),
        ([], ["SEED", "1", "--seed", "3"], ["--seed", "before"]),
        ([], ["DATASET.NUM_SHOTS", "0"], ["NUM_SHOTS", "0"]),
        ([], ["DATASET.NUM_SHOTS", "1.5"], ["NUM_SHOTS", "1.5"]),
        ([], ["DATASET.NUM_SHOTS", "1000"], ["NUM_SHOTS", "1000"]),
        ([], ["DATASET.SUBSAMPLE_CLASSES", "bass"], ["SUBSAMPLE_CLASSES", "bass"]),
        (["--seed", "-5"], [], ["seed", "-5"]),
        (["--seed", "one"], [], ["--seed", "one"]),
        (["--sead", "1"], [], ["--sead"]),
        (["--backbone", "ViT-B/17"], [], ["ViT-B/17", "did you mean", "ViT-B/16"]),
        ([], ["MODEL.BACKBONE.WEIGHTS", "/nowhere/tiny.safetensors"], ["/nowhere/tiny"]),
        (["--config-file", "configs/none.yaml"], [], ["configs/none.yaml"]),
        (["--eval-only", "--model-dir", "/nowhere"], [], ["/nowhere"]),
        (["--model-dir", "/nowhere"], [], ["--model-dir", "--eval-only"]),
        (["--load-epoch", "3"], [], ["--load-epoch", "--model-dir"]),
        ([], ["INPUT.TRANSFORMS", "('random_flop',)"], ["random_flop"]),
        ([], ["TRAINER.DLRCLIP.PREC", "fp8"], ["PREC", "fp8"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(command, tmp_path, capsys, flags, pairs, words):
    try:
        code = train.main(command(*flags, pairs=tuple(pairs)))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert_one_line(capsys.readouterr().err, *words)
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_started_leaves_only_what_was_there(command, tmp_path):
    (tmp_path / "mine").mkdir()
    assert train.main(command(output="mine", pairs=("DATASET.NUM_SHOTS", "0"))) == 2
    assert list((tmp_path / "mine").iterdir()) == []
    assert train.main(command(output="deep/er/run", pairs=("DATASET.NUM_SHOTS", "0"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("content", ["DATASET: [", "- 1\n- 2\n", "\x00"])
def test_malformed_config_file_is_named(command, tmp_path, capsys, content):
    (tmp_path / "bad.yaml").write_text(content)
    assert train.main(command("--config-file", str(tmp_path / "bad.yaml"))) == 2
    assert_one_line(capsys.readouterr().err, "bad.yaml")


def test_debug_shows_the_traceback(command, capsys):
    assert train.main(command("--debug", pairs=("DATASET.NUM_SHOTS", "0"))) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "\nerror: Expected DATASET.NUM_SHOTS" in error


def test_spoilt_checkpoint_is_named(command, tmp_path, capsys):
    folder = tmp_path / "earlier" / "dlrclip"
    folder.mkdir(parents=True)
    (folder / "model.pth.tar-1").write_bytes(b"nothing of the kind")
    assert train.main(command("--eval-only", "--model-dir", str(tmp_path / "earlier"), "--load-epoch", "1")) == 2
    assert_one_line(capsys.readouterr().err, "model.pth.tar-1")


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_checkpoint_that_would_run_code_is_refused(command, tmp_path, capsys):
    folder = tmp_path / "earlier" / "dlrclip"
    folder.mkdir(parents=True)
    torch.save({"state_dict": _Runs()}, folder / "model.pth.tar-1")
    assert train.main(command("--eval-only", "--model-dir", str(tmp_path / "earlier"), "--load-epoch", "1")) == 2
    assert_one_line(capsys.readouterr().err, "model.pth.tar-1")
    assert not Path("ran").exists()


@pytest.fixture
def spoilt_digits(digits_cache, command, tmp_path, monkeypatch):
    """A cache with Digits in which one test image is a text file."""
    from datasets.digits import Digits

    Digits(cfg_of(*command()))
    shutil.copytree(digits_cache / "digits", tmp_path / "cache" / "digits")
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))
    image = json.loads((tmp_path / "cache" / "digits" / "split.json").read_text())["test"][7][0]
    path = tmp_path / "cache" / "digits" / "images" / image
    path.write_text("not an image")
    return path


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_image_is_named_also_from_a_worker(command, spoilt_digits, tmp_path, capfd, workers):
    argv = command("--eval-only", pairs=("DATALOADER.NUM_WORKERS", workers))
    assert train.main(argv) == 2
    assert_one_line(capfd.readouterr().err, str(spoilt_digits))


def test_unreadable_images_are_skipped_on_demand(command, spoilt_digits, tmp_path):
    assert train.main(command("--eval-only", "--skip-bad-images")) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["n"] == 539 and metrics["bad_images"] == 1
    assert (tmp_path / "run" / "bad_images.txt").read_text().startswith(f"{spoilt_digits}\t")


def test_missing_image_is_named(command, spoilt_digits, tmp_path, capsys):
    spoilt_digits.unlink()
    assert train.main(command()) == 2
    assert_one_line(capsys.readouterr().err, "1 of ", str(spoilt_digits))


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("also a bug, once a run is going")])
def test_a_bug_keeps_its_traceback(command, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(TRAINER_REGISTRY.get(TRAINER), "train", fail)
    with pytest.raises(type(error), match="bug"):
        train.main(command())


def told(self):
    with contextlib.suppress(TypeError):  # a raise on purpose is known as such through blocks, too
        try:
            raise ValueError("Expected this but got that") from KeyError("that")
        finally:
            self.tidied = True


def told_of_a_file(self):
    Path("/nowhere/prompts.txt").read_text()


BUGS = [
    (KeyError, lambda self: {}["CTX"]),  # type: ignore[index]  # a bug on purpose
    (IndexError, lambda self: [][3]),
    (AttributeError, lambda self: self.no_such_thing),
    (TypeError, lambda self: len(3)),  # type: ignore[arg-type]  # a bug on purpose
    (ValueError, lambda self: int("many")),
    (json.JSONDecodeError, lambda self: json.loads("{")),  # raised on purpose, but by a library
    (OSError, lambda self: (_ for _ in ()).throw(OSError("bad luck"))),
]


@pytest.mark.parametrize("build_model, words", [(told, "Expected this"), (told_of_a_file, "/nowhere/prompts.txt")])
def test_what_is_told_while_a_model_is_built_is_one_line(command, monkeypatch, tmp_path, capsys, build_model, words):
    monkeypatch.setattr(errors, "_CHECKING_PACKAGES", errors._CHECKING_PACKAGES | {__name__.partition(".")[0]})
    monkeypatch.setattr(TRAINER_REGISTRY.get(TRAINER), "build_model", build_model)
    assert train.main(command()) == 2
    assert_one_line(capsys.readouterr().err, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind, build_model", BUGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bug_while_a_model_is_built_shows_its_traceback(command, monkeypatch, kind, build_model, capsys):
    monkeypatch.setattr(errors, "_CHECKING_PACKAGES", errors._CHECKING_PACKAGES | {__name__.partition(".")[0]})
    monkeypatch.setattr(TRAINER_REGISTRY.get(TRAINER), "build_model", build_model)
    with pytest.raises(kind):  # which the interpreter prints, with exit code 1
        train.main(command())
    assert "error: " not in capsys.readouterr().err


def test_a_bug_while_a_model_is_built_has_exit_code_1(command, tmp_path):
    """As a program, with a trainer of somebody's own."""
    (tmp_path / "mine.py").write_text(
        "import sys, train\n"
        "from dassl.engine import TRAINER_REGISTRY, TrainerX\n"
        "@TRAINER_REGISTRY.register()\n"
        "class Mine(TrainerX):\n"
        "    def build_model(self):\n"
        "        if 'TOLD' in self.cfg.OUTPUT_DIR:\n"
        "            raise ValueError('Expected this but got that')\n"
        "        self.cfg.TRAINER['CTX']\n"
        "sys.exit(train.main())\n"
    )
    for folder, code, said in (("BUG", 1, "Traceback (most"), ("TOLD", 2, "error: Expected this but got that\n")):
        argv = command("--trainer", "Mine", output=folder)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = run_program([tmp_path / "mine.py", *argv], ROOT, environment)
        assert (done.returncode, done.stderr.startswith(said) or said in done.stderr) == (code, True), done.stderr
        assert ("Traceback" in done.stderr) == (code == 1)


def test_an_input_error_while_running_is_one_line(command, monkeypatch, capsys):
    def fail(self):
        raise InputError("Expected this but got that")

    monkeypatch.setattr(TRAINER_REGISTRY.get(TRAINER), "train", fail)
    assert train.main(command()) == 2
    assert_one_line(capsys.readouterr().err, "Expected this but got that")


def test_as_a_program(command):
    done = run_program(["train.py", "--trainer", "Nobody"], ROOT)
    assert done.returncode == 2
    assert_one_line(done.stderr, "Nobody")
