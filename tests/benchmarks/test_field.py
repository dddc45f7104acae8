"""The computations as published are the oracle of ours, for methods beside DLR-CLIP: same losses and gradients."""

import json

import pytest
import torch

from benchmarks import bench_field
from benchmarks.bench_field import BEGIN, END, build_steps, compare, published_cfg
from benchmarks.measure import Stopwatch
from benchmarks.published import LEFT_OUT, METHODS, trainer_of
from benchmarks.steps import gradients
from benchmarks.subject import make_batch
from dassl.engine import TRAINER_REGISTRY
from trainers.base.views_trainer import ViewsTrainer

# The toy CLIP has four blocks in each encoder.
SHALLOW = {
    "MMA": ("TRAINER.MMADAPTER.ADAPTER_START", 2),
    "MMRL": ("TRAINER.MMRL.REP_START", 2),
    "MMRLPP": ("TRAINER.MMRLPP.REP_START", 2),
}


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


def test_prograd_takes_away_what_conflicts(toy_clip):
    """Of two classes, zero-shot CLIP pulls each image to the other one than its label."""
    found = {}
    for share in (1.0, 0.0):
        cfg = published_cfg("ProGrad")
        cfg.TRAINER.PROGRAD.LAMBDA = share
        steps = build_steps("ProGrad", toy_clip, 2, cfg)
        images, _ = make_batch(steps[0].network, 3, 1)
        labels = steps[0].network.both(images)[0].argmin(dim=1)
        for step in steps:
            step.prepare(images)
            (found[share, step.name],) = gradients(step, labels)
        ours, published = found[share, "fresh"], found[share, "naive"]
        # The bound of `compare`: parts of the gradient cancel, and how far they do depends on the processor's rounding.
        assert (ours - published).abs().max() <= 1e-3 * published.abs().max()
    assert not torch.allclose(found[1.0, "naive"], found[0.0, "naive"], rtol=0.01)


def test_the_second_stage_learns_the_classifier_alone(toy_clip):
    first, second = (
        build_steps(name, toy_clip, 6, published_cfg(name))[0] for name in ("TwoStageFS-1", "TwoStageFS-2")
    )
    images, labels = make_batch(first.network, 2, 1)
    for step, learnt in ((first, {"visual", "text"}), (second, {"classifier"})):
        step.prepare(images)
        step.step(labels, Stopwatch(labels.device))
        moved = {name.split(".")[0] for name, p in step.network.learner.named_parameters() if p.grad is not None}
        assert moved == learnt


def test_each_trainer_within_the_encoders_is_compared_or_left_out_for_a_reason():
    """ViewsTrainer is the base of all that train on images, or on what a part of the image tower makes of them."""
    known = TRAINER_REGISTRY.registered_names()
    within = {name for name in known if issubclass(TRAINER_REGISTRY.get(name), ViewsTrainer)}
    compared = {trainer_of(name) for name in METHODS}
    assert compared | set(LEFT_OUT) == within and not compared & set(LEFT_OUT)
    assert all(LEFT_OUT.values())


def test_the_command_writes_a_file_and_a_table(tmp_path, capfd):
    """Of several, each has a process of its own: one that fails does not keep the others from being measured."""
    file, document, threads = tmp_path / "field.json", tmp_path / "PERFORMANCE.md", torch.get_num_threads()
    document.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    toy = ["--model", "toy", "--classes", "6", "--batch", "2", "--threads", "1", "--rounds", "1", "--output", str(file)]
    toy += ["--document", str(document)]
    assert bench_field.main([*toy, "--methods", "MMA,CLIPLoRA"]) == 1  # MMA's adapters begin behind the last toy block
    assert "MMA: no result" in capfd.readouterr().err and "old" in document.read_text()
    assert bench_field.main([*toy, "--methods", "CoOp"]) == 0
    torch.set_num_threads(threads)
    coop, lora = json.loads(file.read_text())["rows"]
    assert coop["method"] == "CoOp" and coop["loss_diff"] <= 2e-5
    assert coop["ratio_views"] == pytest.approx(coop["seconds"]["naive"] / coop["seconds"]["views"])
    assert coop["flop_ratio_views"] > coop["flop_ratio_fresh"] > 1
    assert lora["ratio_views"] is None and lora["loss_diff"] is None  # its dropout draws differ
    assert coop["peak"] > 1e8 and coop["elapsed"] > coop["wall_seconds"]["naive"][0]
    text = document.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| CoOp, batch 2" in text and "| CLIPLoRA, batch 2" in text


def test_wrong_arguments(capsys):
    for wrong, told in ((["--methods", "TipAdapter"], "TipAdapter"), (["--rounds", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            bench_field.parse_args(wrong)
        assert told in capsys.readouterr().err
