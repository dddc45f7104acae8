"""Training and evaluation on a GPU beside the CPU; what can be is tested on the CPU alone, too."""

import copy
import math

import pytest
import torch

import trainers  # noqa: F401  (registers them)
from benchmarks.gpu.syncs import count_steps
from dassl.engine import TRAINER_REGISTRY
from dassl.engine.hooks.losses import as_numbers
from dassl.engine.reliability.finite import largest_gradient
from dassl.utils import load_checkpoint

from .conftest import CUDA

TRAINERS = TRAINER_REGISTRY.registered_names()
# Each kind of step; IMODINO, which clips its gradients, looks at them beside.
STEPPING = (
    "DLRCLIP",
    "CoOp",
    "CoCoOp",
    "CLIPLoRA",
    "MMA",
    "CLIPAdapter",
    "TipAdapterF",
    "TaskRes",
    "CLAP",
)
HARD = ("bf16", "amp", "fp16")
FEW = ("DLRCLIP", "CoOp", "LinearProbe", "TipAdapterF")  # those that the CPU is compared with itself for


def stepping(trainer):
    """A function that makes the next training step as the engine does -> its numbers."""
    trainer.set_model_mode("train")
    trainer.num_batches = trainer.count_batches()
    trainer.epoch = trainer.batch_idx = 0

    def batches():
        while True:
            for number, given in enumerate(trainer.train_batches()):
                trainer.batch_idx = number
                yield given

    stream = batches()

    def step():
        given = next(stream)
        trainer.guard.begin()
        return as_numbers(trainer.forward_backward(*given))

    return step


def first_losses(trainer, count=3):
    step = stepping(trainer)
    return [step()["loss"] for _ in range(count)]


def state_of(trainer):
    """Everything that a step may move, as copies."""
    (name,) = trainer.get_model_names()
    model, optim = trainer._models[name], trainer._optims[name]
    return {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optim.state_dict()["state"])


def same(a, b):
    tensors = all(torch.equal(a[0][k].nan_to_num(-1), b[0][k].nan_to_num(-1)) for k in a[0])  # beta: not yet chosen
    return tensors and all(torch.equal(a[1][p][k], b[1][p][k]) for p in a[1] for k in a[1][p])


@pytest.mark.parametrize("prec", ["fp32", *HARD])
def test_losses_of_dlr_clip_are_near_those_of_the_cpu(make, device, prec):
    wanted = first_losses(make("DLRCLIP"))
    trainer = make("DLRCLIP", "TRAINER.DLRCLIP.PREC", prec, device=device, out="other")
    got = first_losses(trainer)
    assert trainer.device.type == device and all(math.isfinite(loss) for loss in got)
    # The first loss has seen no step. A loss scale may leave the first steps out, while it looks for its size.
    assert got[0] == pytest.approx(wanted[0], rel=2e-2 if prec in HARD else 1e-4)
    if prec == "fp32":
        assert got == pytest.approx(wanted, rel=1e-3)


def with_scale(trainer):
    """The trainer with a loss scale: on the CPU, where amp needs none, one is put in."""
    if trainer.device.type == "cpu":
        trainer.precision.scaler = torch.amp.GradScaler("cpu")
    scaler = trainer.precision.scaler
    assert scaler is not None
    scaler.scale(torch.zeros((), device=trainer.device))  # makes its scale
    scaler.update(1024.0)
    return scaler


def test_an_overflow_leaves_all_as_it_was_but_the_scale(make, device):
    trainer = make("DLRCLIP", "TRAINER.DLRCLIP.PREC", "amp", device=device)
    scaler, step = with_scale(trainer), stepping(trainer)
    step()
    assert trainer.stepped and int(trainer.network.learner.weight_steps) == 1
    scaler.update(3e38)
    before = state_of(trainer)
    numbers = step()
    assert not trainer.stepped and trainer.guard.fault == "" and math.isfinite(numbers["loss"])
    assert same(before, state_of(trainer)) and scaler.get_scale() == pytest.approx(1.5e38)
    scaler.update(1024.0)
    step()
    assert trainer.stepped and not same(before, state_of(trainer)) and scaler.get_scale() == 1024


@pytest.mark.parametrize("prec", ["fp32", "amp"])
def test_a_lost_loss_leaves_all_as_it_was_and_the_scale_too(make, device, prec):
    trainer = make("DLRCLIP", "TRAINER.DLRCLIP.PREC", prec, device=device)
    scaler, step, losses = with_scale(trainer) if prec == "amp" else None, stepping(trainer), trainer.network.losses
    step()
    before = state_of(trainer)
    trainer.network.losses = lambda *given: {name: value * math.nan for name, value in losses(*given).items()}
    assert math.isnan(step()["loss"])
    assert not trainer.stepped and trainer.guard.fault == "the loss" and same(before, state_of(trainer))
    assert scaler is None or scaler.get_scale() == 1024
    trainer.network.losses = losses
    step()
    assert trainer.stepped and trainer.guard.fault == "" and not same(before, state_of(trainer))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_lost_gradient_is_seen(device, bad):
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in ((), (0,), (7,), (300, 1000))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optims = [torch.optim.SGD(parameters[:2], lr=1.0), torch.optim.SGD(parameters[2:], lr=1.0)]
    assert math.isfinite(largest_gradient(optims))
    for place in (parameters[0].grad, parameters[2].grad[3:4], parameters[3].grad[299, 999:]):
        place.fill_(bad)
        assert not math.isfinite(largest_gradient(optims))
        place.fill_(-3e38)
        assert math.isfinite(largest_gradient(optims))
    assert largest_gradient([]) is None


@pytest.mark.parametrize("pairs", [(), ("INPUT.VIEWS", 2), ("TRAINER.DLRCLIP.TEXT_CHUNK", 2)], ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_captured_graphs_make_the_steps_of_the_eager_network(make, device, pairs):
    keys = ("TRAINER.DLRCLIP.COMPILE", True, "TRAINER.DLRCLIP.COMPILE_MODE", "reduce-overhead")
    eager = first_losses(make("DLRCLIP", *pairs, device=device), 12)  # the first steps warm up and capture
    captured = first_losses(make("DLRCLIP", *pairs, *keys, device=device, out="other"), 12)
    assert captured == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("prec", ["fp32", "amp"])
@pytest.mark.parametrize("name", STEPPING)
def test_a_step_waits_for_the_device_once_at_most(make, device, name, prec):
    node = type(make(name)).config_node()
    trainer = make(name, f"TRAINER.{node}.PREC", prec, device=device, out="other")
    step = stepping(trainer)
    for _ in range(2):
        step()
    waits = count_steps(step, trainer.device, 2)
    assert sum(waits.values()) <= 1, waits


def test_kept_views_wait_once(make, device):
    trainer = make("DLRCLIP", "INPUT.VIEWS", 1, device=device)
    step = stepping(trainer)
    for _ in range(trainer.count_batches() + 1):  # the first epoch encodes the views
        step()
    waits = count_steps(step, trainer.device, 2)
    assert sum(count for place, count in waits.items() if "store" not in place and "views.py" not in place) <= 1, waits
    if device == "cuda":
        assert sum(waits.values()) <= 1, waits


@pytest.mark.parametrize("pairs", [(), ("INPUT.VIEWS", 2)], ids=["fresh", "views"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(make, device, pairs, tmp_path):
    settings = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1, "TEST.NO_TEST", True, *pairs)
    whole = make("DLRCLIP", *settings, device=device, out="whole")
    whole.train()
    half = make("DLRCLIP", *settings, device=device, out="half")
    after = half.after_epoch

    def stop():
        after()
        if half.epoch == 1:
            raise KeyboardInterrupt

    half.after_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        half.train()
    again = make("DLRCLIP", *settings, device=device, out="half")
    again.train()
    assert again.start_epoch == 2
    wanted, got = state_of(whole)[0], state_of(again)[0]
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        near = {"rtol": 0, "atol": 0}
        if device == "cuda" and value.is_floating_point():  # which adds up in an order of its own
            near = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(got[name], value, **near, equal_nan=True)
    checkpoint = load_checkpoint(str(tmp_path / "half" / "dlrclip" / "model.pth.tar-3"))
    assert checkpoint["epoch"] == 3


@torch.no_grad()
def test_evaluation_gives_the_logits_of_the_cpu(make, device):
    found = []
    for number, where in enumerate(("cpu", device)):
        trainer = make("DLRCLIP", device=where, out=f"run{number}")
        torch.nn.init.ones_(trainer.network.learner.glr.head.weight)  # at zero it would hide what comes before it
        trainer.set_model_mode("eval")
        batch = next(iter(trainer.test_loader))
        heads = trainer.model_heads(trainer.parse_batch_test(batch)[0])
        found.append({head: logits.cpu() for head, logits in heads.items()})
    assert set(found[0]) == {"clip", "cma", "glr", "final", "fused"}
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=5e-3, equal_nan=True)


@pytest.mark.parametrize(
    "name, device",
    [(name, "cpu") for name in FEW] + [pytest.param(name, *CUDA.values, marks=CUDA.marks) for name in TRAINERS],
)
def test_an_epoch_ends_with_the_accuracy_of_the_cpu(make, name, device):
    results = []
    for where in ("cpu", device):
        trainer = make(name, "TEST.NO_TEST", True, device=where, out=f"run{len(results)}")
        trainer.train()
        results.append(trainer.test())
    assert results[1] == pytest.approx(results[0], abs=0 if device == "cpu" else 3.0)
