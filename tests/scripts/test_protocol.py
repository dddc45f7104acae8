"""Protocols: what runs where and after what, what is refused, and a grid of real runs."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError
from scripts.lib.grid import Progress, next_ready, run_all, threads_of_environment
from scripts.lib.methods import choose_methods
from scripts.lib.protocol_plan import runs_of
from scripts.lib.tables import harmonic
from scripts.protocol import main, make_plan, parse_args
from trainers.dlrclip import DLRCLIP

ROOT = Path(__file__).parents[2]


def plan(*arguments: str):
    return plan_in(Path("out"), *arguments)


def plan_in(output: Path, *arguments: str):
    return make_plan(parse_args([*arguments[:1], "--output", str(output), *arguments[1:]]))


def folders(cells) -> dict[str, str]:
    """Folder of each run -> folder of the run that it evaluates, or ""."""
    return {str(run.folder): str(run.after.folder) if run.after else "" for run in runs_of(cells)}


# Planning


def test_few_shot_lies_where_train_puts_it_and_zero_shot_is_run_once():
    _, cells, left_out = plan("few-shot", "--trainers", "CLIPAdapter,ZeroshotCLIP", "--shots", "1,2", "--seeds", "1,2")
    expected = {f"out/digits/CLIPAdapter/tiny_{k}shots/seed{s}": "" for k in (1, 2) for s in (1, 2)}
    assert folders(cells) == {**expected, "out/ZeroshotCLIP/tiny/digits": ""}
    assert len(cells) == 8 and not left_out  # its one run fills a cell for each number of shots and seed


def test_base2new_tests_new_classes_with_what_was_trained_on_base():
    _, cells, _ = plan("base2new", "--trainers", "ZeroshotCLIP,MMA", "--shots", "4", "--seeds", "3")
    assert folders(cells) == {
        "out/ZeroshotCLIP/tiny/shapes_base": "",
        "out/ZeroshotCLIP/tiny/shapes_new": "",
        "out/base2new/train_base/shapes/shots_4/MMA/tiny/seed3": "",
        "out/base2new/test_new/shapes/shots_4/MMA/tiny/seed3": "out/base2new/train_base/shapes/shots_4/MMA/tiny/seed3",
    }
    base, new = (cell.run for cell in cells[2:])
    assert base.cfg().DATASET.SUBSAMPLE_CLASSES == "base" and "--eval-only" not in base.arguments()
    assert new.cfg().DATASET.SUBSAMPLE_CLASSES == "new"
    where = new.arguments().index("--model-dir")
    assert "--eval-only" in new.arguments() and new.arguments()[where + 1] == str(base.folder)


def test_ood_evaluates_the_few_shot_run_on_the_usual_shifted_sets():
    asked, cells, _ = plan("ood", "--trainers", "LinearProbe", "--seeds", "1")  # its classes are those trained on
    trained = "out/shapes/LinearProbe/tiny_16shots/seed1"
    expected = {trained: ""}
    for target in ("shapes_v2", "shapes_sketch", "shapes_a", "shapes_r"):
        expected[f"out/evaluation/LinearProbe/tiny_16shots/{target}_from_shapes/seed1"] = trained
    assert folders(cells) == expected and list(asked.targets) == ["shapes_v2", "shapes_sketch", "shapes_a", "shapes_r"]
    config = ["--trainers", "CoOp", "--config", "vit_b16", "--seeds", "1", "OPTIM.MAX_EPOCH", "50"]
    _, cells, _ = plan("ood", "--source", "imagenet", *config)
    assert "out/evaluation/CoOp/vit_b16_16shots/imagenet_a/seed1" in folders(cells)  # CoOp's own folder
    assert {run.cfg().OPTIM.MAX_EPOCH for run in runs_of(cells)} == {50}


def test_ablation_runs_each_setting_once():
    _, cells, _ = plan("ablation", "--groups", "parts,temperature", "--shots", "4", "--seeds", "1")
    labels = [cell.row for cell in cells]
    assert labels == ["as configured", "CMA", "GLR", "CMA + GLR", "CMA + SKD", "T 1", "T 2", "T 4"]
    runs = {cell.row: cell.run for cell in cells}
    assert runs["T 2"] == runs["as configured"] and len(set(runs.values())) == 7
    assert runs["as configured"].folder == Path("out/digits/DLRCLIP/tiny_4shots/seed1")
    assert runs["CMA"].folder == Path("out/ablation/digits/DLRCLIP/tiny_4shots/cma/seed1")
    node = runs["CMA"].cfg().TRAINER.DLRCLIP
    assert (node.CMA, node.GLR, node.SKD) == (True, False, False)


@pytest.mark.parametrize("config, least", [("tiny", 20), ("vit_b16", 4)])
def test_every_variant_of_an_ablation_is_a_configuration_that_the_trainer_takes(config, least):
    groups = ["--groups", "layers"] if config == "vit_b16" else []  # the others are the same
    _, cells, _ = plan("ablation", "--config", config, "--seeds", "1", *groups)
    assert len({cell.row for cell in cells}) == len(cells) >= least
    for cell in cells:
        DLRCLIP.read_settings(cell.run.cfg())


def test_transductive_plans_every_kind_of_sets_without_training_images():
    _, cells, _ = plan("transductive", "--tasks", "30", "--seeds", "1,2")
    methods = ["EMDirichlet:tiny_zeroshot", "StatA", "TransCLIP:tiny_zeroshot"]
    assert list(dict.fromkeys(cell.row for cell in cells)) == methods and len(cells) == 3 * 11 * 2
    assert len(runs_of(cells)) == 3 * (10 * 2 + 1)  # all test images need no draw
    found = {}
    for cell in cells[-22::2]:
        node = cell.run.cfg().TRAINER.TRANSCLIP
        assert not node.SUPPORTS
        found[cell.block, cell.column] = (
            node.TASK_SIZE, node.TASK_CLASSES, node.TASK_CLASSES_MOST, node.STREAM, node.NUM_TASKS
        )  # fmt: skip
    assert found["digits, tasks", "very low, 64"] == (64, 1, 4, 0.0, 30)
    assert found["digits, tasks", "very high, 1000"] == (1000, 50, 100, 0.0, 30)
    assert found["digits, tasks", "all"][0] == 0
    assert found["digits, streams", "high"][::3] == (128, 0.001) and found["digits, streams", "separate"][3:] == (
        -1.0,
        3,
    )
    folder = cells[-1].run.folder
    assert folder == Path("out/transductive/digits/TransCLIP/tiny_zeroshot/streams_separate/seed2")
    node = cells[0].run.cfg().TRAINER.EMDIRICHLET
    assert not node.SUPPORTS and node.EXPECTED == 5
    _, cells, _ = plan("transductive", "--trainers", "TransCLIP", "--config", "vit_b16", "--seeds", "1")
    assert {cell.run.cfg().TRAINER.TRANSCLIP.SUPPORTS for cell in cells} == {False}
    assert cells[0].run.cfg().TRAINER.TRANSCLIP.NUM_TASKS == 1000


def test_a_variant_is_a_method_with_folders_of_its_own():
    (method,) = choose_methods("DLRCLIP@cma+glr", "tiny")
    assert (method.stem, method.options) == ("tiny@cma+glr", ("TRAINER.DLRCLIP.SKD", "False"))
    _, cells, _ = plan("few-shot", "--trainers", "DLRCLIP@cma+glr", "--shots", "1", "--seeds", "1")
    assert list(folders(cells)) == ["out/digits/DLRCLIP/tiny@cma+glr_1shots/seed1"]


def test_label_noise_has_a_run_for_each_share_and_few_shot_s_without_noise():
    methods = ["--trainers", "ZeroshotCLIP,CLIPAdapter@mae+drop", "--shots", "4", "--seeds", "101"]
    _, cells, _ = plan("label-noise", *methods, "--noise", "0,0.2,0.6")
    own = "CLIPAdapter/tiny@mae+drop_4shots/seed101"
    assert folders(cells) == {
        "out/ZeroshotCLIP/tiny/digits": "",
        f"out/digits/{own}": "",
        f"out/label_noise/0.2/digits/{own}": "",
        f"out/label_noise/0.6/digits/{own}": "",
    }
    assert [cell.column for cell in cells] == ["0", "0.2", "0.6"] * 2
    node, cfg = cells[-1].run.cfg().DATASET, cells[-1].run.cfg()
    assert (node.LABEL_NOISE, node.SUSPICIOUS, node.CLEANING, cfg.OPTIM.LOSS) == (0.6, True, "drop", "mae")
    assert not cells[3].run.cfg().DATASET.SUSPICIOUS


def test_foreign_images_take_the_place_of_wrong_labels():
    methods = ["--trainers", "DeIL@mae", "--seeds", "101"]
    _, cells, _ = plan("label-noise", *methods, "--noise", "0.4", "--foreign", "shapes", "--dataset", "digits")
    assert folders(cells) == {"out/foreign_shapes/0.4/digits/DeIL/tiny@mae_16shots/seed101": ""}
    node = cells[0].run.cfg().DATASET
    assert (node.LABEL_NOISE, node.FOREIGN, node.FOREIGN_FROM, node.SUSPICIOUS) == (0.0, 0.4, "Shapes", True)
    assert node.CLEANING == "none"  # DeIL's own config cleans; a variant is what its name says


def test_what_evaluates_waits_and_goes_first_when_it_can():
    _, cells, _ = plan("base2new", "--trainers", "MMA", "--seeds", "1,2")
    one, one_new, two, two_new = runs_of(cells)
    assert next_ready([one, one_new, two, two_new], []) == one
    assert next_ready([one_new, two, two_new], [one]) == two
    assert next_ready([one_new, two_new], [two]) == one_new
    assert next_ready([two_new], [two]) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["base2new", "--trainers", "MMA,LinearProbe"], "LinearProbe: it cannot be evaluated on classes .* weights"),
        (["cross-dataset", "--trainers", "TipAdapterF"], "images in the cache of its own"),
        (["base2new", "--trainers", "EMDirichlet"], "images of its own"),
        (["cross-dataset", "--trainers", "TransCLIP"], "images of its own"),
        (["base2new", "--trainers", "CoOp", "TRAINER.COOP.CSC", "True", "TRAINER.COOP.CTX_INIT", ""], "a context"),
        (["few-shot", "--trainers", "TipAdapterPP"], "MODEL.IMO_WEIGHTS"),
        (["few-shot", "--trainers", "MMA@cma"], "variant of MMA"),
        (["ablation", "--trainers", "CoOp"], "variants in scripts/lib/ablations.py"),
        (["ablation", "--groups", "part"], "groups of variants"),
        (["few-shot", "--groups", "parts"], "no --groups"),
        (["ood", "--source", "digits", "--trainers", "MMA"], "--targets for digits"),
        (["ood", "--source", "digits,shapes"], "one dataset"),
        (["few-shot", "--targets", "shapes"], "no --targets"),
        (["base2new", "--shots", "1,2"], "one number of shots"),
        (["few-shot", "--dataset", "digit"], "configs/datasets"),
        (["few-shot", "--jobs", "0"], "--jobs"),
        (["few-shot", "--noise", "0.2"], "no --noise for few-shot"),
        (["few-shot", "--foreign", "shapes"], "--foreign with label-noise only"),
        (["label-noise", "--dataset", "digits", "--foreign", "digits"], "another dataset, but got digits"),
        (["label-noise", "--dataset", "digits", "--foreign", "shape"], "configs/datasets"),
        (["label-noise", "--noise", "0.2,1"], "--noise to be shares, at least 0 and below 1"),
        (["label-noise", "--trainers", "GDA@mae"], "OPTIM.LOSS to be ce for GDA"),
        (["few-shot", "OPTIM.LR"], "no value"),
        (["few-shot", "--trainers", "MMA", "--read-only"], "finished runs"),
        (["transductive", "--trainers", "StatA,MMA"], "transductive methods but got MMA"),
        (["transductive", "--tasks", "0"], "--tasks to be at least 1 but got 0"),
        (["few-shot", "--tasks", "5"], "--tasks to be left out for few-shot but got 5"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_input_is_said_before_any_run(tmp_path, capsys, arguments, message):
    where = ["--output", str(tmp_path / "none")]
    try:
        code = main([arguments[0], *where, *arguments[1:]])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and not (tmp_path / "none").exists()
    assert re.search(message, said), said


def test_without_trainers_those_that_cannot_are_named(capsys):
    assert main(["base2new", "--seeds", "1", "--dry-run"]) == 0
    said = capsys.readouterr()
    for name in ("LinearProbe", "TipAdapter", "TipAdapterPP", "EMDirichlet", "TransCLIP"):
        assert f"{name} is left out: " in said.err
    commands = [line for line in said.out.splitlines() if line.startswith("python train.py")]
    assert sum("--trainer CoCoOp" in line for line in commands) == 2 and "LinearProbe" not in said.out
    assert all(line.startswith("python train.py --seed") for line in commands)


@pytest.mark.parametrize(
    "script, arguments, folder",
    [
        ("few_shot", ["digits", "tiny", "1"], "digits/MMA/tiny_1shots/seed3"),
        ("base2new_train", ["digits", "2"], "base2new/train_base/digits/shots_4/MMA/tiny/seed2"),
        ("base2new_test", ["digits", "2"], "base2new/test_new/digits/shots_4/MMA/tiny/seed2"),
        ("cross_dataset", ["digits", "2"], "evaluation/MMA/tiny_4shots/digits_from_shapes/seed2"),
        ("ood", ["shapes_a", "tiny"], "evaluation/MMA/tiny_4shots/shapes_a_from_shapes/seed3"),
        ("ablation", ["digits", "tiny", "1"], "ablation/digits/DLRCLIP/tiny_1shots/cma/seed3"),
    ],
)
def test_shell_scripts_ask_for_the_runs_that_their_names_say(script, arguments, folder, capsys):
    given = {"PYTHON": "echo", "CFG": "tiny", "SHOTS": "4", "SOURCE": "shapes", "DATA": "x"}
    given["TRAINER"] = "DLRCLIP" if script == "ablation" else "MMA"
    command = ["bash", str(ROOT / "scripts" / "dlr" / f"{script}.sh")]
    options = [*arguments, "--output", "out", "--dry-run", "OPTIM.LR", "0.5"]
    called = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=True, env={**os.environ, **given}
    )
    program, *rest = called.stdout.split()
    assert Path(program).resolve() == ROOT / "scripts" / "protocol.py"
    assert main(rest) == 0
    last = capsys.readouterr().out.splitlines()
    assert any(f"--output-dir out/{folder} " in line for line in last)
    assert all("--root x" in line and line.endswith("OPTIM.LR 0.5") for line in last[:-1])
    if script == "base2new_train":
        assert not any("--eval-only" in line for line in last)
    short = subprocess.run([*command, *arguments[:-1]], capture_output=True, text=True)
    assert short.returncode == 2 and short.stderr.startswith("usage: ")


# Tables


def finish(run, *, kway: float | None = None, **heads: float) -> None:
    """Leaves what a finished run leaves; the last head is the method's own."""
    results = {"heads": {head: {"accuracy": value} for head, value in heads.items()}, "main": list(heads)[-1]}
    if kway is not None:
        results["heads_kway"] = {head: {"accuracy": kway} for head in heads}
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.cfg().dump())
    recipe = TRAINER_REGISTRY.get(run.cfg().TRAINER.NAME).recipe
    (run.folder / "metrics.json").write_text(json.dumps({"split": "test", "test": results, "recipe": recipe}))
    (run.folder / "DONE").write_text(json.dumps({"finished": "2026-11-21T10:00:00+00:00"}))


def table(stem: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with open(f"{stem}.csv", newline="") as stream:
        return {(row["dataset"], row["method"], row["column"]): row for row in csv.DictReader(stream)}


def test_harmonic_mean_is_taken_seed_by_seed(tmp_path, capsys):
    arguments = ["base2new", "--output", str(tmp_path), "--trainers", "MMA,ZeroshotCLIP", "--seeds", "1,2", "--shots=1"]
    _, cells, _ = make_plan(parse_args(arguments))
    numbers = {("base", 1): 90.0, ("new", 1): 30.0, ("base", 2): 60.0, ("new", 2): 60.0}
    for cell in cells[:4]:
        finish(cell.run, clip=1.0, mma=numbers[cell.column, cell.seed])
    for cell in cells[4:6]:
        finish(cell.run, clip={"base": 80.0, "new": 20.0}[cell.column])
    assert main([*arguments, "--read-only", "--write", str(tmp_path / "t")]) == 0
    rows = table(tmp_path / "t")
    assert float(rows["shapes", "MMA", "H"]["mean"]) == pytest.approx((45.0 + 60.0) / 2)
    assert float(rows["shapes", "ZeroshotCLIP", "H"]["mean"]) == pytest.approx(32.0)
    assert rows["shapes", "ZeroshotCLIP", "new"]["n"] == "2"  # the same for both seeds
    assert harmonic(0.0, 0.0) == 0.0
    shown = capsys.readouterr().out
    assert "H = 2bn/(b+n) of each seed" in shown and "| 52.5 (10.6) ±7.5 |" in shown
    assert "\\mathbf" not in (tmp_path / "t.tex").read_text() and "$52.5_{" in (tmp_path / "t.tex").read_text()
    assert main([*arguments[:-1], "--shots=2", "--read-only"]) == 0  # zero-shot is there for any number of shots


def test_all_heads_under_shift_and_classes_taken_as_new_ones(tmp_path):
    where = ["--output", str(tmp_path), "--write", str(tmp_path / "t")]
    arguments = ["ood", *where, "--trainers", "DLRCLIP,MMA", "--seeds", "1", "--targets", "shapes_v2,shapes_a"]
    _, cells, _ = make_plan(parse_args(arguments))
    for cell, value in zip(cells, (90.0, 70.0, 50.0), strict=False):
        finish(cell.run, clip=40.0, final=value, robust=value + 1.0, kway=10.0 if value == 50.0 else None)
    for cell, value in zip(cells[3:], (80.0, 60.0, 40.0), strict=True):
        finish(cell.run, clip=40.0, mma=value)
    assert main([*arguments, "--read-only"]) == 0
    rows = table(tmp_path / "t")
    assert [float(rows["shapes", f"DLRCLIP {head}", "average"]["mean"]) for head in ("clip", "robust")] == [40.0, 61.0]
    assert float(rows["shapes", "MMA", "average"]["mean"]) == 50.0  # one head beside zero-shot: one row
    kway = "shapes, classes taken as new ones"
    assert float(rows[kway, "DLRCLIP robust", "shapes_a"]["mean"]) == 10.0
    assert float(rows[kway, "MMA", "shapes_a"]["mean"]) == 40.0  # its classes do not see each other
    assert (kway, "MMA", "shapes_v2") not in rows
    assert main([*arguments, "--heads", "main", "--read-only"]) == 0
    assert ("shapes", "DLRCLIP", "average") in table(tmp_path / "t")


def test_zero_shot_clip_has_a_row_beside_transductive_methods(tmp_path):
    where = ["--output", str(tmp_path), "--write", str(tmp_path / "t")]
    arguments = ["transductive", *where, "--trainers", "StatA,TransCLIP:tiny_zeroshot", "--seeds", "1,2"]
    _, cells, _ = make_plan(parse_args(arguments))
    for cell, clip, value in ((cells[0], 60.0, 62.0), (cells[1], 50.0, 55.0), (cells[22], 60.0, 40.0)):
        assert cell.column == "very low, 64"
        finish(cell.run, clip=clip, main=value)
    assert main([*arguments, "--read-only"]) == 0
    rows = table(tmp_path / "t")
    means = {method: (float(row["mean"]), row["n"]) for (_, method, _), row in rows.items()}
    assert means == {"ZeroshotCLIP": (55.0, "2"), "StatA": (58.5, "2"), "TransCLIP:tiny_zeroshot": (40.0, "1")}
    assert list(means)[0] == "ZeroshotCLIP"


def test_an_ablation_has_heads_as_columns(tmp_path):
    where = ["--output", str(tmp_path), "--write", str(tmp_path / "t")]
    arguments = ["ablation", *where, "--groups", "lambda", "--seeds", "1", "--shots", "1"]
    _, cells, _ = make_plan(parse_args(arguments))
    finish(cells[0].run, clip=1.0, cma=2.0, final=3.0)
    finish(cells[2].run, clip=1.0, cma=4.0, final=5.0)
    assert main([*arguments, "--read-only"]) == 0
    means = {key[1:]: float(row["mean"]) for key, row in table(tmp_path / "t").items()}
    assert means["LAMBDA 0.01", "cma"] == means["as configured", "cma"] == 2.0 and means["LAMBDA 0.1", "final"] == 5.0


def listed(value):
    """What a run says of its list; nothing was doubted in the first one."""
    above = None if value == 1 else 90.0
    return {"precision": 50.0 + value, "precision_above": above, "recall_above": 10.0}


def test_label_noise_has_a_table_of_the_list_s_precision_and_averages_datasets_for_each_number_of_shots(tmp_path):
    where = ["--output", str(tmp_path), "--write", str(tmp_path / "t")]
    arguments = ["label-noise", *where, "--trainers", "CLIPAdapter@drop", "--seeds", "101", "--shots", "1,4"]
    arguments += ["--dataset", "digits,shapes", "--noise", "0,0.4"]
    _, cells, _ = make_plan(parse_args(arguments))
    for value, cell in enumerate(cells):
        finish(cell.run, clip=0.0, clipadapter=float(value))
        if cell.column != "0":
            path = cell.run.folder / "metrics.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "suspicious": listed(value)}))
    assert main([*arguments, "--read-only"]) == 0
    means = {key: float(row["mean"]) for key, row in table(tmp_path / "t").items()}
    at = {(block, column): mean for (block, _, column), mean in means.items()}
    assert at["digits, 1 shot", "0.4"] == 1.0 and at["shapes, 1 shot", "0.4"] == 5.0
    assert at["average, 1 shot", "0.4"] == 3.0 and at["average, 4 shots", "0"] == 4.0
    assert means["digits, 1 shot, precision of the list", "CLIPAdapter", "0.4"] == 51.0  # variants have the same list
    assert ("digits, 1 shot, precision of the list", "0") not in at and len(at) == 12 + 4 + 3 + 4
    assert ("digits, 1 shot, precision of what cleaning doubts", "0.4") not in at
    assert at["shapes, 1 shot, recall of what cleaning doubts", "0.4"] == 10.0


# Real runs


BASE2NEW = ["--dataset", "digits", "--trainers", "CLIPAdapter", "--shots", "1", "--seeds", "1"]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("protocol")
    arguments = ["base2new", *BASE2NEW, "--output", str(folder), "--threads", "1", "--jobs", "2"]
    assert main([*arguments, "OPTIM.MAX_EPOCH", "2"]) == 0
    return folder


def test_a_grid_runs_and_is_read_the_next_time(output, capsys):
    rows = table(output / "tables" / "base2new_digits")
    base, new = (
        json.loads((output / "base2new" / part / "digits/shots_1/CLIPAdapter/tiny/seed1/metrics.json").read_text())
        for part in ("train_base", "test_new")
    )
    assert (base["mode"], new["mode"]) == ("train", "eval")
    assert float(rows["digits", "CLIPAdapter", "H"]["mean"]) == harmonic(base["accuracy"], new["accuracy"])
    assert main(["base2new", *BASE2NEW, "--output", str(output), "--dry-run", "OPTIM.MAX_EPOCH", "2"]) == 0
    assert "# 0 of 2 runs are missing" in capsys.readouterr().out
    assert main(["base2new", *BASE2NEW, "--output", str(output), "OPTIM.MAX_EPOCH", "3"]) == 2
    assert "OPTIM.MAX_EPOCH" in capsys.readouterr().err  # these runs are others


def test_a_broken_run_and_what_evaluated_it_are_missing(output, capsys):
    def missing() -> str:
        assert main(["base2new", *BASE2NEW, "--output", str(output), "--dry-run", "OPTIM.MAX_EPOCH", "2"]) == 0
        return capsys.readouterr().out

    mark = output / "base2new" / "train_base" / "digits/shots_1/CLIPAdapter/tiny/seed1" / "DONE"
    before = mark.read_text()
    mark.write_text(before.replace('"finished": "2', '"finished": "3'))  # trained again since the evaluation
    again = missing()
    assert "# 1 of 2 runs are missing" in again and "--eval-only" in again
    mark.unlink()
    assert "# 2 of 2 runs are missing" in missing()
    mark.write_text(before)
    assert "# 0 of 2 runs are missing" in missing()


def test_what_evaluates_a_failed_run_is_not_started(tmp_path):
    *_, base, new = runs_of(make_plan(parse_args(["base2new", *BASE2NEW, "--output", str(tmp_path)]))[1])
    (base.folder / "config.yaml").mkdir(parents=True)  # it cannot write its records
    ends = []
    run_all([new, base], 2, 1, lambda run, code: ends.append((run, code)))
    assert [run for run, _ in ends] == [base, new]
    assert ends[0][1] not in (0, None) and ends[1][1] is None
    assert not new.folder.exists()


@pytest.mark.parametrize(("value", "threads"), [("", 0), ("1", 1), (" 3 ", 3), ("4,2", 4)])
def test_threads_follow_the_environment(value, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads_of_environment() == threads


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_wrong_threads_in_the_environment(value, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(InputError, match=f'OMP_NUM_THREADS to be a number from 1 but got "{value}"'):
        run_all([], 1)


@pytest.mark.parametrize(("given", "expected"), [(0, 1), (2, 2)])
def test_a_run_has_the_threads_asked_for(given, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, (cell,), _ = plan_in(tmp_path, "few-shot", "--trainers", "ZeroshotCLIP", "--shots", "1", "--seeds", "1")
    run_all([cell.run], 1, given)
    assert json.loads((cell.run.folder / "environment.json").read_text())["threads"] == expected


def test_the_progress_bar_names_a_run_that_is_going(tmp_path, capsys):
    *_, base, new = runs_of(make_plan(parse_args(["base2new", *BASE2NEW, "--output", str(tmp_path)]))[1])
    name = f"CLIPAdapter digits {base.shots} shots seed {base.seed}"
    with Progress(2) as progress:
        progress.on_start(base)
        progress.on_start(new)
        progress.on_end(base, 0)
        progress.on_end(new, 0)
    shown = capsys.readouterr().err.split("\r")
    assert any(f"{name} and 1 more" in line for line in shown), shown
    assert "2/2" in shown[-1] and name not in shown[-1], shown
