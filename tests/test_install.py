"""The package installed for real: built as a wheel, put into a folder of its own, and used from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest

from dassl.utils.cli import registered_names
from dlr_clip_cli.command import SHORT, commands, figures

ROOT = Path(__file__).parents[1]
FOLDERS = ("trainers", "datasets", "dassl", "scripts", "configs", "published", "dlr_clip_cli")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds what `pip install .` puts into site-packages."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in FOLDERS:  # not in the checkout itself: a build leaves folders behind
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(target), "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, installed) -> Path:
    """A folder that has nothing to do with either, with an upstream Dassl and a package `datasets` beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "theirs" / "datasets").mkdir(parents=True)
    (folder / "theirs" / "datasets" / "__init__.py").write_text('NAME = "theirs"\n')
    (folder / "upstream").mkdir()
    (folder / "upstream" / "dassl").symlink_to(ROOT / "dassl")
    (folder / "broken" / "dassl").mkdir(parents=True)
    (folder / "broken" / "dassl" / "__init__.py").write_text('raise ImportError("upstream was imported")\n')
    (folder / "work").mkdir()
    return folder


@pytest.fixture
def run(installed, elsewhere):
    """Run a program of the installed package from the folder `work`; more of `elsewhere` goes first on its path."""

    def run(*command: str, path: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment["PYTHONPATH"] = os.pathsep.join([*(str(elsewhere / name) for name in path), str(installed)])
        environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(
            [sys.executable, *command],
            cwd=elsewhere / "work",
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def command(run, installed):
    """Run `dlr-clip ...` where an upstream Dassl is there that cannot be imported: the command has its own toolbox."""
    return lambda *words: run(str(installed / "bin" / "dlr-clip"), *words, path=("broken", "theirs"))


def test_what_is_installed(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        *("bin", "dlr_clip", "dlr_clip_cli"),
    }
    inside = installed / "dlr_clip"
    assert [path.name for path in (inside / "_toolbox").iterdir()] == ["dassl"]
    assert not (inside / "scripts" / "dev").exists()
    here = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert {path.relative_to(inside / "_configs") for path in inside.glob("_configs/**/*.yaml")} == here
    tables = {path.name for path in (ROOT / "published").glob("*.csv")}
    assert tables and {path.name for path in (inside / "_published").iterdir() if path.suffix == ".csv"} == tables
    for folder, own in (
        ("trainers", inside),
        ("datasets", inside / "datasets"),
        ("dassl", inside / "_toolbox" / "dassl"),
    ):
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.suffix != ".pyc"]
        assert [path for path in files if path.name != "__pycache__" and not (own / path).exists()] == []


def test_import_without_another_toolbox(run, installed):
    """The bundled toolbox is found, the name `datasets` stays whose it is, and no module is there twice."""
    script = (
        "import json, sys, dlr_clip, dassl.engine, datasets\n"
        "import dlr_clip.app.configuration as app\n"
        "import dlr_clip.scripts, dlr_clip.imo, trainers.imo, scripts.lib.jobs, dlr_clip.scripts.lib.jobs\n"
        "assert trainers is dlr_clip and trainers.imo is dlr_clip.imo and scripts is dlr_clip.scripts\n"
        "assert scripts.lib.jobs is dlr_clip.scripts.lib.jobs and trainers.imo.__spec__.name == 'dlr_clip.imo'\n"
        "from dassl.data.datasets import DATASET_REGISTRY\n"
        "print(json.dumps({'files': [dlr_clip.__file__, dassl.__file__, app.datasets.__file__],\n"
        "    'trainers': dassl.engine.TRAINER_REGISTRY.registered_names(), 'datasets': datasets.NAME,\n"
        "    'modules': {item.__module__.partition('.')[0] for _, item in DATASET_REGISTRY.items()}.pop(),\n"
        "    'config': str(dlr_clip.find_config('DLRCLIP', 'tiny'))}))\n"
    )
    done = run("-c", script, path=("theirs",))
    found = json.loads(done.stdout)
    places = ("dlr_clip/__init__.py", "dlr_clip/_toolbox/dassl/__init__.py", "dlr_clip/datasets/__init__.py")
    assert found["files"] == [str(installed / place) for place in places]
    assert sorted(found["trainers"], key=str.lower) == registered_names(ROOT / "trainers", "TRAINER_REGISTRY")
    assert (found["datasets"], found["modules"]) == ("theirs", "dlr_clip")
    assert Path(found["config"]).is_relative_to(installed) and done.stderr == ""


def test_import_beside_an_upstream_and_other_trainers(run, elsewhere):
    """Upstream stays in charge, and a trainer that is registered already is left alone, with a word in the log."""
    script = (
        "import json, logging\n"
        "logging.basicConfig(format='%(message)s')\n"
        "from dassl.engine import TRAINER_REGISTRY, TrainerX\n"
        "@TRAINER_REGISTRY.register()\n"
        "class CoOp(TrainerX):\n"
        "    pass\n"
        "import dassl, dlr_clip\n"
        "print(json.dumps([dassl.__file__, TRAINER_REGISTRY.get('CoOp') is CoOp,\n"
        "    TRAINER_REGISTRY.get('DLRCLIP').__module__]))\n"
    )
    done = run("-c", script, path=("upstream",))
    file, theirs, module = json.loads(done.stdout)
    assert Path(file) == elsewhere / "upstream" / "dassl" / "__init__.py" and theirs
    assert module == "dlr_clip.dlrclip.trainer"
    assert done.stderr == "CoOp of __main__ stays registered, that of dlr_clip.coop is left out\n"


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("predict", "--help"), ("figure", "--help")])
def test_help_comes_without_the_imports_that_take_seconds(run, words):
    script = (
        "import sys\n"
        "from dlr_clip_cli.command import main\n"
        "try:\n"
        f"    main({list(words)})\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "print('imported:', {'torch', 'numpy', 'dlr_clip'} & set(sys.modules) or 'none')\n"
    )
    said = run("-c", script).stdout
    assert said.startswith(f"usage: {' '.join(['dlr-clip', *words[:-1]])} ") and said.endswith("imported: none\n")
    assert "python train.py" not in said


def test_every_command_is_there(command, installed):
    said = command("--help").stdout
    for name, module in commands().items():
        assert not module or (installed / "dlr_clip" / "scripts" / f"{module}.py").is_file()
        assert f"\n  {name} " in said
    named = {"train", "predict", "compare", "protocol", "report", "figure", *SHORT.values()}
    assert named <= {*commands(), "figure"} and set(SHORT) <= set(commands().values())
    said = command("figure", "--help").stdout
    assert all(f"\n  {name} " in said for name in figures()) and {"shots", "curves", "logits"} <= set(figures())


def test_train_predict_compare_and_draw(command, elsewhere):
    started = time.time()
    done = command(
        *("train", "--trainer", "LinearProbe", "--config", "tiny", "--seed", "1"),
        *("DATASET.NUM_SHOTS", "1", "USE_CUDA", "False", "DATALOADER.NUM_WORKERS", "0"),
    )
    folder = elsewhere / "work" / "output" / "digits" / "LinearProbe" / "tiny_1shots" / "seed1"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"] > 60 and (folder / "DONE").stat().st_mtime >= started, done.stdout
    image = next(Path(os.environ["DLR_CLIP_CACHE"]).glob("digits/**/*.png"))
    done = command("predict", "--model-dir", str(folder), "--json", str(image))
    assert len(json.loads(done.stdout)["images"][0]["predictions"]) == 5
    done = command(
        *("compare", "--dataset", "digits", "--trainers", "ZeroshotCLIP,LinearProbe", "--shots", "1", "--seeds", "1"),
        *("USE_CUDA", "False", "DATALOADER.NUM_WORKERS", "0"),
    )
    assert f"{metrics['accuracy']:.1f}" in done.stdout
    console = folder.parents[2] / "ZeroshotCLIP" / "tiny_1shots" / "seed1" / "console.txt"
    assert " dlr-clip train --seed 1 " in console.read_text()
    assert command("figure", "logits", str(folder)).stdout.count(str(folder / "figures")) == 2


def test_a_command_that_is_not_there():
    done = subprocess.run(
        [sys.executable, "-m", "dlr_clip_cli", "figure", "shot"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "a command of dlr-clip figure" in done.stderr and '"shot" (did you mean "shots"?)' in done.stderr


def test_the_two_programs_say_what_they_are_called(monkeypatch):
    """The checkout's, and the same code under the command's name."""
    spec = util.find_spec("dlr_clip_cli.places")
    places = util.module_from_spec(spec)
    spec.loader.exec_module(places)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert not places.INSTALLED and places.spoken("train") == "python train.py"
    monkeypatch.setattr(sys, "argv", ["dlr-clip train", "--help"])
    assert places.spoken("train") == "dlr-clip train"
