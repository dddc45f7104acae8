"""From published numbers to a verdict: on Digits, with the tiny CLIP and a published table of its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dassl.utils import InputError
from dlr_clip_cli.train import parse_args
from scripts.figures.plot_shots import shots_figure
from scripts.lib import published
from scripts.lib.dataset_sources import SOURCES
from scripts.lib.methods import choose_methods, methods_with, registered_name
from scripts.lib.protocol_plan import SOURCE_OF
from scripts.lib.published import AVERAGES, Ours, Published, pair_table, pairs, read_published
from scripts.lib.published_settings import SETTINGS, pairs_for, read_settings
from scripts.lib.tables import harmonic
from scripts.reproduce import main, plan, wanted
from scripts.reproduce import parse_args as reproduce_args
from trainers.app.configuration import setup_cfg
from trainers.clip import IMAGENET_TEMPLATES_SELECT
from trainers.clip.templates import parse_templates

HEAD = list(Published._fields)


def write(folder: Path, *rows: dict[str, object], head: list[str] = HEAD) -> Path:
    usual = {"head": "", "backbone": "tiny", "classes": "all", "seeds": "1 2", "source": "a paper", "notes": ""}
    folder.mkdir(exist_ok=True)
    with open(folder / "numbers.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, head, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**usual, **row} for row in rows)
    return folder


def zero_shot(accuracy: float) -> dict[str, object]:
    return {"dataset": "digits", "method": "ZeroshotCLIP", "shots": 0, "accuracy": accuracy, "seeds": ""}


def gda(accuracy: object, **more: object) -> dict[str, object]:
    return {"dataset": "digits", "method": "GDA", "shots": 2, "accuracy": accuracy, **more}


# ------------------------------------------------------------------------------------------------- the table


def test_all_published_numbers_can_be_read_and_name_what_there_is():
    found = read_published()
    assert len(found) > 600
    known = {one.stem for one in (published.CONFIGS / "datasets").glob("*.yaml")} | set(AVERAGES)
    for one in found:
        assert one.dataset in known and one.source, one
        choose_methods(one.method, "rn50" if one.backbone == "RN50" else "vit_b16")  # raises where there is none
    assert {one.backbone for one in found} == {"ViT-B/16", "RN50"}
    new = {(one.method, one.classes): one.accuracy for one in found if one.classes != "all"}
    for method, base in [(method, value) for (method, classes), value in new.items() if classes == "base"]:
        harmonic = 2 * base * new[method, "new"] / (base + new[method, "new"])
        # Published ones are means over datasets, or of the means; both are near this one.
        assert new[method, "h"] == pytest.approx(harmonic, abs=0.5), method


@pytest.mark.parametrize(
    "row, head, words",
    [
        (gda(101), HEAD, "0 to 100 percent"),
        (gda("much"), HEAD, "numbers for shots, accuracy and seeds"),
        (gda(50, classes="some"), HEAD, "all, base, new, h"),
        (gda(50), HEAD[:-1], "to have the columns dataset, method"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, head, words):
    with pytest.raises(InputError, match=words):
        read_published(write(tmp_path / "p", row, head=head))


def test_a_number_stands_once(tmp_path):
    with pytest.raises(InputError, match="one value of digits GDA"):
        read_published(write(tmp_path / "p", gda(50), gda(51)))


def test_averages_need_all_datasets_and_go_seed_by_seed():
    known = Published("average10", "GDA", "", "RN50", 4, "all", 70.0, (1,), "a paper", "")
    ours = [
        Ours(name, "GDA", "gda", "RN50", 4, seed, 60.0 + number + seed)
        for number, name in enumerate(AVERAGES["average10"])
        for seed in (1, 2, 3)
    ]
    (pair,) = pairs(ours, [known])
    assert pair.values == (65.5, 66.5, 67.5) and pair.difference == pytest.approx(-3.5) and pair.verdict == "outside"
    assert pairs(ours[3:], [known]) == []
    assert pairs([*ours[:2], *ours[3:]], [known])[0].values == (65.5, 66.5)  # a seed that one dataset lacks
    assert "average10" in pair_table([pair]) and pair_table([]) == ""
    assert pair._replace(values=(65.5,)).verdict == "" and pair._replace(values=(69.0, 70.5, 71.0)).verdict == "inside"


def test_a_harmonic_mean_is_of_a_seeds_accuracies():
    known = [Published("dtd", "GDA", "", "RN50", 4, part, 60.0, (), "a paper", "") for part in ("base", "new", "h")]
    given = {("base", 1): 80.0, ("new", 1): 40.0, ("base", 2): 60.0, ("new", 2): 60.0, ("base", 3): 10.0}
    ours = [Ours("dtd", "GDA", "gda", "RN50", 4, seed, value, True, part) for (part, seed), value in given.items()]
    assert [one.values for one in pairs(ours, known)] == [
        (80.0, 60.0, 10.0),
        (40.0, 60.0),
        (pytest.approx(160 / 3), 60.0),
    ]
    assert pairs(ours, [known[0]._replace(classes="all")]) == []


def test_settings_of_the_sources_fit_the_configurations():
    """Each pair is a key of its method's configuration, and changes something there."""
    found = read_settings()
    numbers = read_published()
    assert {one.method for one in found} <= {one.method for one in numbers}
    for one in found:
        backbones = {number.backbone for number in numbers if number.method == one.method}
        (method,) = choose_methods(one.method, "rn50" if backbones == {"RN50"} else "vit_b16")
        yaml_file = published.CONFIGS / "datasets" / f"{one.dataset or 'dtd'}.yaml"
        usual = ["--trainer", method.trainer, "--config-file", str(method.config)]
        usual += ["--dataset-config-file", str(yaml_file), "--output-dir", "output"]
        for key, value in zip(one.pairs[::2], one.pairs[1::2], strict=True):
            before, after = (_value(parse_args([*usual, *more]), key) for more in ([], [key, value]))
            assert before != after, (one, key)


def _value(args, key):
    node = setup_cfg(args)
    for name in key.split("."):
        node = node[name]
    return node


def test_every_published_number_has_runs_that_have_training_images():
    numbers, settings = read_published(), read_settings()
    for name, backbone in sorted({(one.method, one.backbone) for one in numbers} - {("ZeroshotCLIP", "ViT-B/16")}):
        args = reproduce_args([name, "--config", "rn50" if backbone == "RN50" else "vit_b16"])
        (method,) = choose_methods(args.method, args.config)
        plans = plan(args, method, wanted(args, method, numbers), settings)
        trained = {(run.after or run).dataset for run, _ in plans}
        assert plans and all(SOURCES[registered_name(dataset)].counts[1] > 0 for dataset in trained), (name, trained)
        assert name != "DLRCLIP" or {"imagenetv2", "imagenet_sketch"} <= {run.dataset for run, _ in plans}


def test_batches_of_imagenet_are_those_of_dlr_clip_s_logs():
    for name, dataset, size in (("DLRCLIP", "imagenetv2", 32), ("DLRCLIP@cma", "imagenet", 32), ("DLRCLIP", "dtd", 16)):
        args = reproduce_args([name, "--shots", "16", "--datasets", dataset])
        (method,) = choose_methods(args.method, args.config)
        planned = plan(args, method, wanted(args, method, read_published()), read_settings())
        assert {(run.after or run).cfg().DATALOADER.TRAIN_X.BATCH_SIZE for run, _ in planned} == {size}, name


def test_the_last_setting_of_a_key_counts(tmp_path):
    path = tmp_path / SETTINGS
    path.write_text(
        "method,protocol,shots,dataset,settings,source\nGDA,few-shot,,,SEED 3 INPUT.NO_TRANSFORM True,x\n"
        "GDA,few-shot,2,,SEED 4,x\nGDA,few-shot,,dtd,SEED 5,x\nGDA,base2new,,,SEED 6,x\n"
    )
    found = read_settings(tmp_path)
    assert pairs_for(found, "GDA", "few-shot", 1, "digits") == ("SEED", "3", "INPUT.NO_TRANSFORM", "True")
    assert pairs_for(found, "GDA", "few-shot", 2, "digits")[:2] == ("SEED", "4")
    assert pairs_for(found, "GDA", "few-shot", 2, "dtd")[:2] == ("SEED", "5")
    assert pairs_for(found, "GDA", "base2new", 2, "dtd") == ("SEED", "6")
    assert pairs_for(found, "GDA@x", "base2new", 2, "dtd") == ("SEED", "6")  # variants have them, too
    assert pairs_for(found, "GD", "base2new", 2, "dtd") == ()
    for wrong in ("GDA,few-shot,,,SEED,x", "GDA,some,,,SEED 3,x", "GDA,few-shot,two,,SEED 3,x"):
        path.write_text(f"method,protocol,shots,dataset,settings,source\n{wrong}\n")
        with pytest.raises(InputError, match="Expected"):
            read_settings(tmp_path)
    path.write_text("method\nGDA\n")
    with pytest.raises(InputError, match="to have the columns"):
        read_settings(tmp_path)
    for content in (b"\xff", b"x" * 200_000):  # no UTF-8, and a cell that the csv module refuses
        path.write_bytes(content)
        with pytest.raises(InputError, match="readable CSV file"):
            read_settings(tmp_path)


def test_the_figure_shows_published_numbers_of_the_datasets_it_has(tmp_path):
    table = write(tmp_path / "p", gda(50), {**gda(60), "dataset": "dtd"}, zero_shot(40), {**gda(1), "backbone": "RN50"})
    found = published.published_records("tiny", {"Digits"}, read_published(table))
    assert [(one["dataset"], one["method"], one["shots"], one["accuracy"]) for one in found] == [
        ("Digits", "GDA (published)", 2, 50.0),
        ("Digits", "ZeroshotCLIP (published)", 0, 40.0),
    ]
    assert shots_figure([*found, {**found[0], "method": "GDA", "seed": 1}]).axes


# ------------------------------------------------------------------------------------------------ whole runs


def cells_of(out: str, dataset: str) -> list[list[str]]:
    """Return the cells of the printed rows of datasets whose names begin so."""
    return [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in out.splitlines()
        if row.startswith(f"| {dataset}")
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Make the numbers once, and publish them."""
    folder = tmp_path_factory.mktemp("world")
    first = write(folder / "first", gda(50))
    flags = ["--config", "tiny", "--output", str(folder / "runs")]
    assert main(["GDA", *flags, "--published", str(first)]) == 0
    accuracy = {}
    for path in (folder / "runs").rglob("metrics.json"):
        found = json.loads(path.read_text())
        accuracy[found["trainer"], found["seed"]] = found["accuracy"]
    assert set(accuracy) == {("ZeroshotCLIP", 1), ("GDA", 1), ("GDA", 2)}
    return folder, flags, accuracy


def test_ours_stand_beside_the_published_ones(world, capsys):
    folder, flags, accuracy = world
    mean = (accuracy["GDA", 1] + accuracy["GDA", 2]) / 2
    table = write(folder / "second", zero_shot(accuracy["ZeroshotCLIP", 1] + 0.2), gda(mean + 0.12))
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("metrics.json")}
    assert main(["GDA", *flags, "--published", str(table)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}  # nothing was made twice
    out = capsys.readouterr().out
    assert "digits: 10 classes" in out and "hours" not in out  # no run is missing, so that nothing is estimated
    row = next(line for line in out.splitlines() if line.startswith("| digits") and "GDA" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[5:9] == ["2", f"{mean + 0.12:.1f}", "-0.1", "inside"]
    assert row in (folder / "runs" / "reproduced" / "GDA_tiny.md").read_text()


def test_a_strange_zero_shot_stops_before_anything_is_trained(world, capsys):
    folder, flags, accuracy = world
    table = write(folder / "third", zero_shot(accuracy["ZeroshotCLIP", 1] + 0.4), gda(90, shots=1))
    assert main(["GDA", *flags, "--published", str(table)]) == 1
    out, err = capsys.readouterr()
    assert "within 0.3 points of the published" in err and "weights, images or prompts are others" in err
    assert "seconds of a run" in out
    assert not list((folder / "runs").glob("digits/GDA/tiny_1shots/*/metrics.json"))


def test_zero_shot_has_the_settings_of_its_source_too(world, tmp_path, capsys):
    _, _, accuracy = world
    table = write(tmp_path / "p", zero_shot(accuracy["ZeroshotCLIP", 1]), gda(50))
    (table / SETTINGS).write_text(
        "method,protocol,shots,dataset,settings,source\n"
        'ZeroshotCLIP,few-shot,,digits,"DATASET.TEMPLATE ""(\'one {}.\', \'the other {}.\')""",its authors\n'
    )
    assert main(["GDA", "--config", "tiny", "--output", str(tmp_path / "runs"), "--published", str(table)]) == 1
    out, err = capsys.readouterr()
    assert "as in its authors: ZeroshotCLIP, few-shot, digits: DATASET.TEMPLATE" in out and "prompts are others" in err
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    assert "the other {}." in config.read_text() and "ZeroshotCLIP" in str(config)


def test_zero_shot_on_imagenet_has_the_templates_behind_the_published_number():
    settings = read_settings()
    for dataset in ("imagenet", "imagenet_sketch"):
        pairs_of_it = pairs_for(settings, "ZeroshotCLIP", "few-shot", 0, SOURCE_OF.get(dataset, dataset))
        key, value = pairs_of_it
        assert key == "DATASET.TEMPLATE" and parse_templates(value) == list(IMAGENET_TEMPLATES_SELECT)


def test_it_can_only_check(world, capsys):
    folder, flags, _ = world
    table = write(folder / "fourth", {**gda(90), "method": "LinearProbe"})
    assert main(["LinearProbe", *flags, "--published", str(table), "--check-only"]) == 0
    assert "runs to make" in capsys.readouterr().out
    assert not (folder / "runs" / "digits" / "LinearProbe").exists()


def test_base_to_new_goes_the_whole_way_with_the_settings_of_the_source(tmp_path, capsys):
    rows = [gda(50, classes=part) for part in ("base", "new", "h")]
    strange = {**zero_shot(100.0), "classes": "new"}
    table, flags = write(tmp_path / "p", *rows), ["--config", "tiny", "--output", str(tmp_path / "runs")]
    (table / SETTINGS).write_text(
        "method,protocol,shots,dataset,settings,source\nGDA,base2new,,,TRAINER.GDA.VIEWS 1,its authors' repository\n"
    )
    assert main(["GDA", *flags, "--published", str(table), "--seeds", "1,2"]) == 0
    out = capsys.readouterr().out
    assert "as in its authors' repository: GDA, base2new: TRAINER.GDA.VIEWS 1" in out
    found = {}
    for path in (tmp_path / "runs" / "base2new").rglob("metrics.json"):
        metrics = json.loads(path.read_text())
        found["base" if "train_base" in str(path) else "new", metrics["seed"]] = metrics["accuracy"]
    assert len(found) == 4
    of_gda = {row[3]: float(row[4].split()[0]) for row in cells_of(out, "digits") if row[1] == "GDA"}
    assert of_gda["h"] == pytest.approx(
        sum(harmonic(found["base", seed], found["new", seed]) for seed in (1, 2)) / 2, abs=0.051
    )
    assert "VIEWS: 1" in next((tmp_path / "runs" / "base2new" / "train_base").rglob("config.yaml")).read_text()
    write(table, *rows, strange)
    assert main(["GDA", *flags, "--published", str(table), "--protocol", "base2new"]) == 1
    assert "(new classes) but got" in capsys.readouterr().err


def test_a_shifted_set_is_met_by_what_was_trained_on_its_source(tmp_path, capsys):
    rows = [{**gda(50), "dataset": name} for name in ("shapes", "shapes_v2")]
    table, runs = write(tmp_path / "p", *rows, {**zero_shot(0.0), "dataset": "shapes_v2"}), tmp_path / "runs"
    (table / SETTINGS).write_text(
        "method,protocol,shots,dataset,settings,source\nGDA,few-shot,,shapes,TRAINER.GDA.VIEWS 1,its authors\n"
    )
    command = ["GDA", "--config", "tiny", "--output", str(runs), "--published", str(table), "--seeds", "1"]
    assert main(command) == 1  # zero-shot CLIP is better than 0 % on it
    assert "To go on without: --datasets shapes\n" in capsys.readouterr().err
    write(table, *rows)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "as in its authors: GDA, few-shot, shapes: TRAINER.GDA.VIEWS 1" in out
    folders = {
        "shapes": runs / "shapes/GDA/tiny_2shots/seed1",
        "shapes_v2": runs / "evaluation/GDA/tiny_2shots/shapes_v2_from_shapes/seed1",
    }
    accuracy = {}
    for name, folder in folders.items():
        accuracy[name] = json.loads((folder / "metrics.json").read_text())["accuracy"]
        assert "VIEWS: 1" in (folder / "config.yaml").read_text()
    of_gda = {row[0]: float(row[4].split()[0]) for row in cells_of(out, "shapes") if row[1] == "GDA"}
    assert of_gda == pytest.approx(accuracy, abs=0.051) and accuracy["shapes_v2"] < accuracy["shapes"]
    assert not list(runs.rglob("shapes_v2/GDA"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["GDAA"], 'did you mean "GDA"'),
        (["CoOp"], "published numbers of CoOp with tiny but there are none; there are some of GDA"),
        (["GDA", "--shots", "4"], "shots of 2"),
        (["GDA", "--datasets", "shapes"], "datasets of digits"),
        (["GDA", "SEED"], "no value"),
        (["GDA", "--protocol", "base2new"], "with tiny but there are none in base2new"),
    ],
)
def test_bad_input_is_said_before_any_run(tmp_path, arguments, words, capsys):
    table = write(tmp_path / "p", gda(50))
    output = ["--config", "tiny", "--output", str(tmp_path / "runs"), "--published", str(table)]
    assert main([arguments[0], *output, *arguments[1:]]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_missing_images_are_told_with_what_to_do(tmp_path, capsys):
    row = {**gda(50), "dataset": "dtd"}
    table = write(tmp_path / "p", row)
    code = main(["GDA", "--config", "tiny", "--root", str(tmp_path), "--published", str(table)])
    err = capsys.readouterr().err
    assert code == 2 and "dtd" in err and "GDA" in methods_with("tiny")
    write(table, row, {**row, "dataset": "eurosat"}, gda(50))
    assert main(["GDA", "--config", "tiny", "--root", str(tmp_path), "--published", str(table)]) == 2
    out, err = capsys.readouterr()
    assert "Expected 3 datasets as published but got 1" in err and err.count("\n") == 1
    told = dict(line.split(": ", 1) for line in out.splitlines())
    assert "10 classes" in told["digits"] and all("docs/DATASETS.md" in told[name] for name in ("dtd", "eurosat"))
