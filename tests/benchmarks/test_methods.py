"""The computations as published are the oracle of ours, for methods beside DLR-CLIP: same losses and gradients."""

import json

import pytest
import torch

from benchmarks import bench_methods
from benchmarks.bench_methods import BEGIN, END, compare, published_cfg
from benchmarks.published import METHODS

# The toy CLIP has four blocks in each encoder.
SHALLOW = {"MMA": ("TRAINER.MMADAPTER.ADAPTER_START", 2), "MMRL": ("TRAINER.MMRL.REP_START", 2)}


@pytest.mark.parametrize("name", METHODS)
def test_ours_has_the_losses_and_gradients_as_published(name, toy_clip):
    cfg = published_cfg(name)
    cfg.merge_from_list(list(SHALLOW.get(name, ())))
    found = compare(name, toy_clip, cfg, classes=6, batch=3)
    assert found["loss"] <= 2e-5 and found["gradient"] <= 2e-4


def test_a_difference_ends_the_program(toy_clip, monkeypatch):
    monkeypatch.setattr(METHODS["KgCoOp"], "words", "", raising=False)
    monkeypatch.setattr(METHODS["KgCoOp"], "loss", METHODS["CoOp"].loss)
    with pytest.raises(RuntimeError, match="Expected KgCoOp to have the losses and gradients as published"):
        compare("KgCoOp", toy_clip, published_cfg("KgCoOp"), classes=6)


def test_the_command_writes_a_file_and_a_table(tmp_path):
    file, document, threads = tmp_path / "methods.json", tmp_path / "PERFORMANCE.md", torch.get_num_threads()
    document.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    toy = ["--model", "toy", "--classes", "6", "--batch", "2", "--threads", "1", "--rounds", "1", "--output", str(file)]
    assert bench_methods.main([*toy, "--methods", "CoOp"]) == 0
    assert bench_methods.main([*toy, "--methods", "CLIPLoRA", "--document", str(document)]) == 0
    torch.set_num_threads(threads)
    coop, lora = json.loads(file.read_text())["rows"]
    assert coop["method"] == "CoOp" and coop["loss_diff"] <= 2e-5
    assert coop["ratio_views"] == pytest.approx(coop["seconds"]["naive"] / coop["seconds"]["views"])
    assert coop["flop_ratio_views"] > coop["flop_ratio_fresh"] > 1
    assert lora["ratio_views"] is None and lora["loss_diff"] is None  # its dropout draws differ
    text = document.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| CoOp, batch 2" in text and "| CLIPLoRA, batch 2" in text


def test_wrong_arguments(capsys):
    for wrong, told in ((["--methods", "TipAdapter"], "TipAdapter"), (["--rounds", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            bench_methods.parse_args(wrong)
        assert told in capsys.readouterr().err
