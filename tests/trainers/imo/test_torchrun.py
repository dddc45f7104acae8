"""Adapters trained in two processes under torchrun (gloo): the losses of one, and what remains of a killed job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import imo_two_processes
import pytest
from PIL import Image

from trainers.app import train
from trainers.features.corrected import read_recipe

ROOT = Path(train.__file__).parents[2]
HELPER = str(ROOT / "tests" / "helpers" / "imo_two_processes.py")
# Entries of the whole batch are dropped, and gradients of the whole batch shortened, as in one process.
AUTHORS = ("TRAINER.IMO.FORM", "beside", "TRAINER.IMO.DROPOUT", "0.4", "TRAINER.IMO.SCALE", "1.0")
SHORT_GRADIENTS = ("TRAINER.IMODINO.CLIP_GRAD", "0.01")
TIMEOUT = 900  # seconds, for machines with other things to do


def in_two(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HELPER, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of pictures: 30 to train on, 6 for validation, 3 to test on."""
    folder = tmp_path_factory.mktemp("imo")
    for part, count in (("train", 10), ("val", 2), ("test", 1)):
        for label, name in enumerate(("red", "green", "blue")):
            place = folder / "images" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                color = [40 + 9 * i] * 3
                color[label] = 230 - 9 * i
                picture = Image.new("RGB", (70, 64), tuple(color))
                picture.paste((255, 255, 255), (4 * i, 10, 4 * i + 20, 40))
                picture.save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def command(folder, random_tiny):
    """Arguments of train.py: 21 steps (7 epochs of 3) on batches of 10."""

    def command(trainer: str, output: str, *pairs: str) -> list[str]:
        config = ROOT / "configs" / "trainers" / trainer.lower() / "tiny.yaml"
        small = ("TRAINER.IMODINO.OUT_DIM", "16") if trainer == "IMODINO" else ()
        return [
            *("--trainer", trainer, "--config-file", str(config), "--seed", "1", "--root", str(folder / "images")),
            *("--output-dir", str(folder / output), "DATASET.NAME", "ImageFolder"),
            *(
                "MODEL.BACKBONE.WEIGHTS",
                str(random_tiny),
                "OPTIM.MAX_EPOCH",
                "7",
                "DATALOADER.TRAIN_X.BATCH_SIZE",
                "10",
            ),
            *("USE_CUDA", "False", "TEST.NO_TEST", "True", *small, *pairs),
        ]

    return command


def test_two_processes_have_the_losses_of_one(folder, command):
    losses = {}
    for name in ("one", "two"):
        spec = folder / f"{name}.json"
        spec.write_text(
            json.dumps([command("IMO", f"{name}/imo", *AUTHORS), command("IMODINO", f"{name}/dino", *SHORT_GRADIENTS)])
        )
        if name == "one":
            imo_two_processes.main(str(spec))
        else:
            done = in_two(str(spec))
            assert done.returncode == 0, done.stderr[-3000:]
        losses[name] = json.loads(spec.with_suffix(".losses.json").read_text())
    for one, two in zip(losses["one"], losses["two"], strict=True):
        assert len(one) == 21 and two == pytest.approx(one, abs=1e-4)
    for method in ("imo", "dino"):
        assert [read_recipe(folder / name / method)["processes"] for name in ("one", "two")] == [1, 2]
        found = [json.loads((folder / name / method / "overlap.json").read_text()) for name in ("one", "two")]
        assert found[1]["after"]["overlap"] == pytest.approx(found[0]["after"]["overlap"], abs=0.2)
        assert found[1]["after"]["variance"] == pytest.approx(found[0]["after"]["variance"], rel=1e-2)


def test_a_killed_process_ends_the_job_which_resumes_from_its_last_checkpoint(folder, command):
    spec = folder / "killed.json"
    spec.write_text(json.dumps([command("IMODINO", "killed", "TRAIN.CHECKPOINT_FREQ", "1")]))
    done = in_two(str(spec), "kill")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "exitcode  : -9" in done.stderr, done.stderr[-3000:]
    assert not (folder / "killed" / "DONE").exists()
    assert (folder / "killed" / "imodino" / "model.pth.tar-1").is_file()
    again = imo_two_processes.run(command("IMODINO", "killed", "TRAIN.CHECKPOINT_FREQ", "1"))
    whole = imo_two_processes.run(command("IMODINO", "whole", "TRAIN.CHECKPOINT_FREQ", "1"))
    assert len(again) == 18 and again == pytest.approx(whole[3:], abs=1e-4)
    assert (folder / "killed" / "DONE").exists()
