"""Steps whose loss, loss terms or gradients are not finite: the run stops, or leaves them out, and keeps its sense."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dassl.engine.reliability.finite import NotFiniteError, largest_gradient
from dassl.utils import InputError

STEPS = 4  # of an epoch: 18 images, batch 4, the last two are dropped


def losing(trainer, steps, how):
    """Have the steps of these numbers (from 0, over the run) lose their numbers: `how` gets the loss."""
    backward = trainer.model_backward_and_update

    def lossy(loss, names=None):
        backward(how(loss, trainer) if trainer.global_step in steps else loss, names)

    trainer.model_backward_and_update = lossy
    return trainer


def to_nan(loss, trainer):
    return loss * math.nan


def to_infinite_gradient(loss, trainer):
    return loss + (trainer.net.weight.sum() * 0).abs().sqrt()  # 0, whose gradient is 0 * infinity


def state_of(trainer):
    return {name: value.clone() for name, value in trainer.net.state_dict().items()}


def test_it_stops_before_the_step_and_says_all(build, tmp_path):
    trainer = losing(build("Linear", "TRAIN.CHECKPOINT_FREQ", 1), {6}, to_nan)
    step, states = trainer.forward_backward, []

    def recording(batch):
        states.append(state_of(trainer))
        return {**step(batch), "loss_extra": 0.25, "acc": 50.0}

    trainer.forward_backward = recording
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert len(states) == 7 and torch.equal(trainer.net.weight, states[-1]["weight"])
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "Expected the loss to be finite but it is not, at step 7, epoch [2/3] batch [3/4]: the step changed nothing"
    )
    assert lines[1].startswith("  loss terms: loss ") and "loss_extra 0.25" in lines[1]
    record = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert len(record["images"]) == 4 and all(path in lines[2] for path in record["images"])
    assert record["step"] == 7 and set(record["terms"]) == {"loss", "loss_extra", "acc"}
    assert (
        lines[3]
        == f"  last good checkpoint: {tmp_path / 'run' / 'net' / 'model.pth.tar-1'}"
        == (f"  last good checkpoint: {record['checkpoint']}")
    )
    assert "TRAIN.ON_NAN skip" in lines[4] and len(lines) == 5
    assert not (tmp_path / "run" / "DONE").exists() and trainer.writer is None
    # The same command goes on from there, and ends as a run that lost nothing.
    again, whole = build("Linear", "TRAIN.CHECKPOINT_FREQ", 1), build(output="whole")
    again.train(), whole.train()
    assert again.start_epoch == 1 and torch.equal(again.net.weight, whole.net.weight)


@pytest.mark.parametrize("how, what", [(to_nan, "the loss"), (to_infinite_gradient, "a gradient")])
def test_skipping_leaves_model_and_optimizer_as_they_were(build, tmp_path, how, what, caplog):
    pairs = ("TRAIN.ON_NAN", "skip", "OPTIM.NAME", "adam", "OPTIM.LR", 0.01)
    trainer = losing(build("Linear", *pairs), {0, 6}, how)
    step, kept = trainer.forward_backward, []

    def watching(batch):
        before = state_of(trainer), len(trainer._optims["net"].state)
        summary = step(batch)
        if trainer.global_step in (0, 6):
            kept.append(torch.equal(before[0]["weight"], trainer.net.weight))
            kept.append(len(trainer._optims["net"].state) == before[1])
        return {**summary, "loss": math.nan} if trainer.global_step == 6 else summary

    trainer.forward_backward = watching
    trainer.train()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert kept == [True] * 4 and metrics["skipped_steps"] == 2
    assert all(math.isfinite(value) for value in metrics["train"].values())
    assert all(torch.isfinite(p).all() for p in trainer.net.parameters())
    steps = {int(state["step"]) for state in trainer._optims["net"].state.values()}
    assert steps == {3 * STEPS - 2}
    assert trainer._scheds["net"].last_epoch == 3  # the schedule goes on, so that it ends where it should
    said = [line for line in caplog.messages if "left out" in line]
    assert said[0] == f"epoch [1/3] batch [1/4]: {what} is not finite; step left out (1 of at most 10)"
    assert len(said) == 2


def test_running_means_of_the_forward_pass_are_put_back(build):
    """A BatchNorm takes a batch in before its loss is known; a left-out step must not spoil it for good."""
    means = {}
    for number, steps in enumerate(({2}, set())):
        trainer = build("Linear", "TRAIN.ON_NAN", "skip", "OPTIM.MAX_EPOCH", 1, output=f"run{number}")
        trainer.net = trainer._models["net"] = torch.nn.Sequential(torch.nn.BatchNorm1d(3), trainer.net)
        normal, infer = trainer.net[0], trainer.model_inference

        def spoiling(input, steps=steps, trainer=trainer, infer=infer):
            return infer(input * math.nan if trainer.global_step in steps and trainer.net.training else input)

        def step(batch, trainer=trainer, normal=normal, inner=trainer.forward_backward, number=number):
            summary = inner(batch)
            means[number, trainer.global_step] = normal.running_mean.clone()
            return summary

        trainer.model_inference, trainer.forward_backward = spoiling, step
        moved = []
        trainer.after_update = lambda trainer=trainer, moved=moved: moved.append(trainer.global_step)
        trainer.train()
        assert moved == [n for n in range(STEPS) if n not in steps]
        assert torch.isfinite(normal.running_mean).all() and int(normal.num_batches_tracked) == len(moved)
    assert means[0, 2].isnan().all() and torch.equal(means[0, 1], means[1, 1])


def test_no_count_where_nothing_was_skipped(build, tmp_path):
    build("Linear", "TRAIN.ON_NAN", "skip", "OPTIM.MAX_EPOCH", 1).train()
    assert "skipped_steps" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_a_stopped_run_goes_on_with_skipping(build, tmp_path):
    with pytest.raises(NotFiniteError):
        losing(build("Linear", "TRAIN.CHECKPOINT_FREQ", 1), {6}, to_nan).train()
    losing(build("Linear", "TRAIN.CHECKPOINT_FREQ", 1, "TRAIN.ON_NAN", "skip"), {6}, to_nan).train()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["skipped_steps"] == 1 and metrics["epochs"] == 3


def test_skipping_has_a_limit_that_a_resumed_run_remembers(build):
    pairs = ("TRAIN.ON_NAN", "skip", "TRAIN.ON_NAN_LIMIT", 2, "TRAIN.CHECKPOINT_FREQ", 1)
    with pytest.raises(NotFiniteError, match="at step 6, .*; 2 such steps were skipped") as caught:
        losing(build("Linear", *pairs), {1, 2, 5}, to_nan).train()
    assert "ON_NAN skip" not in str(caught.value)
    with pytest.raises(NotFiniteError, match="at step 8, .*; 2 such steps were skipped"):
        losing(build("Linear", *pairs), {7}, to_nan).train()


def test_a_term_alone(build, tmp_path):
    """One that is not in the loss: the model is sound, but something is wrong."""

    def with_terms(trainer):
        step = trainer.forward_backward
        trainer.loss_terms = ("kd",)
        trainer.forward_backward = lambda batch: {
            **step(batch),
            "kd": math.inf if trainer.global_step == 1 else 0.5,
            "agreement": math.nan,  # no loss: as methods show numbers that some batches do not have
        }
        return trainer

    with pytest.raises(NotFiniteError, match="^Expected kd to be finite but it is not, at step 2, "):
        with_terms(build()).train()
    with_terms(build("Linear", "TRAIN.ON_NAN", "skip", output="skip")).train()
    metrics = json.loads((tmp_path / "skip" / "metrics.json").read_text())
    assert metrics["skipped_steps"] == 1 and metrics["train"]["kd"] == 0.5


def test_a_trainer_with_a_backward_of_its_own_is_stopped_even_if_told_to_skip(build):
    trainer = build("Linear", "TRAIN.ON_NAN", "skip")
    trainer.forward_backward = lambda batch: {"loss": math.nan}
    with pytest.raises(NotFiniteError, match="its model may be spoilt"):
        trainer.train()


def test_dry_run_says_it_too(build, tmp_path):
    trainer = losing(build(), {0}, to_nan)
    trainer.forward_backward = lambda batch, step=trainer.forward_backward: {**step(batch), "loss": math.nan}
    with pytest.raises(NotFiniteError, match="Expected the loss to be finite"):
        trainer.dry_run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "pair, message",
    [
        (("TRAIN.ON_NAN", "ignore"), "Expected TRAIN.ON_NAN to be one of stop, skip but got"),
        (("TRAIN.ON_NAN_LIMIT", 0), "Expected TRAIN.ON_NAN_LIMIT to be at least 1 but got 0"),
    ],
)
def test_settings(build, pair, message):
    with pytest.raises(InputError, match=message):
        build("Linear", *pair)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_single_lost_gradient_is_seen_in_every_precision(kind):
    """On a GPU: tests/cuda/test_devices.py."""
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=kind)) for shape in ((), (0,), (7,), (30, 100))]
    parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.finfo(kind).max)  # whose squares, and sum, are infinite
    optims = [torch.optim.SGD(parameters[:2], lr=1.0), torch.optim.SGD(parameters[2:], lr=1.0)]
    assert math.isfinite(largest_gradient(optims))
    for bad in (math.nan, math.inf, -math.inf):
        for place in (parameters[0].grad, parameters[2].grad[3:4], parameters[3].grad[29, 99:], parameters[4].grad[:1]):
            before = place.clone()
            place.fill_(bad)
            assert not math.isfinite(largest_gradient(optims))
            place.copy_(before)
    assert math.isfinite(largest_gradient(optims)) and largest_gradient([]) is None
