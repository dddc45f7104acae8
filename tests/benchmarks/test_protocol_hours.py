"""Hours of the protocols, from steps that are given."""

import json

import pytest

from benchmarks import protocol_hours
from benchmarks.protocol_hours import PROTOCOLS, Part, Step, encoding_hours, hours, main
from scripts.lib.dataset_sources import SOURCES


def test_a_step_is_a_line_through_two_measured_numbers_of_classes():
    step = Step({10: 1.0, 100: 10.0})
    assert step(10) == pytest.approx(1.0) and step(1000) == pytest.approx(100.0)
    assert Step({10: 2.0, 100: 1.0})(1000) == pytest.approx(2.0)  # noise makes no step cheaper with more classes
    assert Step({10: 2.0, 100: 1.0}, least=0.01)(1000) == pytest.approx(2.0 + 9.9)
    with pytest.raises(ValueError, match="two numbers of classes"):
        Step({10: 1.0})


def test_hours_are_those_of_the_published_recipe():
    one, dtd = Step({1: 1.0, 2: 1.0}), SOURCES["DescribableTextures"].counts
    parts = [Part("few-shot", "dtd", 16, 3, 1.0)]
    steps = 200 * (47 * 16 // 32)  # CoOp: 200 epochs of batches of 32
    assert hours("CoOp", parts, one, 0.0, False) == pytest.approx(3 * steps / 3600)
    few = [parts[0]._replace(shots=1)]
    assert hours("CoOp", few, one, 0.0, False) == pytest.approx(3 * 50 / 3600)  # 50 epochs of one batch
    more = hours("CoOp", parts, one, 2.0, True) - hours("CoOp", parts, one, 0.0, False)
    assert more == pytest.approx(3 * 2.0 * (dtd[3] + 10 * 47 * 16) / 3600)
    assert hours("CLIPLoRA", parts, one, 0.0, False) == pytest.approx(3 * 500 * 16 / 3600)
    stages = sum(hours(name, parts, one, 0.0, False) for name in ("TwoStageFS-1", "TwoStageFS-2"))
    assert stages == pytest.approx(3 * 300 * 16 / 3600)
    # DLR-CLIP keeps the last, smaller batch of 16 (47 images: three steps), and trains ImageNet with batches of 32.
    assert hours("DLRCLIP", few, one, 0.0, False) == pytest.approx(3 * 50 * 3 / 3600)
    imagenet = [Part("few-shot", "imagenet", 16, 1, 1.0)]
    line = Step({10: 12.0, 100: 102.0})  # 2 s for the images, 1 s for each class
    assert hours("DLRCLIP", imagenet, line, 0.0, False) == pytest.approx((2 * 2 + 1000) * 50 * 16000 / 32 / 3600)
    half = [parts[0]._replace(protocol="base2new", share=0.5)]
    assert hours("MaPLe", half, Step({1: 1.0, 2: 2.0}), 0.0, False) == pytest.approx(
        3 * 5 * (int(23.5 * 16) // 4) * 23.5 / 3600
    )


def test_encoding_meets_test_images_once_and_each_picked_image_ten_times():
    parts = [Part("few-shot", "dtd", shots, 3, 1.0) for shots in (1, 2)]
    tests = SOURCES["DescribableTextures"].counts[3]
    assert encoding_hours(parts, 2.0) == pytest.approx(2.0 * (tests + 10 * 3 * 47 * (1 + 2)) / 3600)


def test_the_table_is_made_of_the_results(tmp_path, capsys):
    for classes in (10, 100):
        seconds = {"fresh": 2.0 + classes, "views": 1.0}
        rows = [{"method": "CoOp", "seconds": seconds}, {"method": "MaPLe", "seconds": {"fresh": 1.0}}]
        found = {"settings": {"threads": 2, "classes": classes}, "rows": rows}
        (tmp_path / f"{classes}.json").write_text(json.dumps(found))
        own = {"settings": {"threads": 2, "classes": classes}, "seconds": {"naive": 9.0, "fresh": 2.0, "views": 1.0}}
        (tmp_path / f"step_{classes}.json").write_text(json.dumps(own))
    steps = [
        {"trainer": "CoOp", "mode": mode, "batch": batch, "classes": classes, "seconds": 0.04}
        for mode in ("bf16", "fp16")
        for batch in (32, 128)
        for classes in (100, 1000)
    ]
    own_steps = [
        {"way": way, "mode": "bf16", "batch": 16, "classes": classes, "seconds": 0.05 if way == "fresh" else 9.0}
        for way in ("published", "fresh", "views")
        for classes in (100, 1000)
    ]
    speed = {"images_per_second": {"features": 5000.0}}
    parts = {"methods": {"rows": steps}, "steps": {"rows": own_steps}, "evaluation": {"rows": [speed]}}
    day = {"machine": {"gpu": "A GPU"}, "parts": parts}
    (tmp_path / "day.json").write_text(json.dumps(day))
    document = tmp_path / "doc.md"
    document.write_text(f"{protocol_hours.BEGIN}\n{protocol_hours.END}\n")
    files = [str(tmp_path / f"{name}{classes}.json") for name in ("", "step_") for classes in (10, 100)]
    more = ["--image-seconds", "0.1", "--gpu", str(tmp_path / "day.json"), "--document", str(document)]
    assert main([*files, *more]) == 0
    text = document.read_text()
    names = ("CoOp", "MaPLe", "DLRCLIP", "frozen features")
    coop, maple, dlr, last = [next(line for line in text.splitlines() if line.startswith(f"| {n}")) for n in names]
    assert coop.count("|") == 2 + 3 * len(PROTOCOLS) and "- |" not in coop and "A GPU" in text
    assert "- |" not in dlr and last.count(" - |") == len(PROTOCOLS)
    cells = [cell.strip() for cell in dlr.strip("|").split("|")]
    batches, tests = 50 * 16000 / 32, SOURCES["ImageNet"].counts[3]
    assert cells[7] == f"{(2 * 2.0 * batches + 0.1 * tests) / 3600:,.1f}"  # wall seconds are not shared out
    assert cells[9] == f"{(2 * 0.05 * batches + tests / 5000) / 3600:,.1f}"
    assert maple.count("- |") == 2 * len(PROTOCOLS)
    assert main([files[0], "--image-seconds", "0.1"]) != 0
    assert "two numbers of classes" in capsys.readouterr().err
