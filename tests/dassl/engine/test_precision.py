import pytest
import torch

from dassl.engine import Precision
from dassl.utils import InputError


@pytest.mark.parametrize(
    "prec, device, dtype, scales",
    [
        ("fp32", "cuda", None, False),
        ("amp", "cuda", torch.float16, True),
        ("fp16", "cuda", torch.float16, True),
        ("bf16", "cuda", torch.bfloat16, False),
        ("fp32", "cpu", None, False),
        ("amp", "cpu", torch.bfloat16, False),
        ("fp16", "cpu", torch.bfloat16, False),
        ("bf16", "cpu", torch.bfloat16, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_what_each_name_means(prec, device, dtype, scales):
    precision = Precision(prec, device)
    assert precision.dtype is dtype and (precision.scaler is not None) == scales


@pytest.mark.parametrize("prec, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("amp", torch.bfloat16)])
def test_forward_and_step_on_the_cpu(prec, dtype):
    precision, layer = Precision(prec), torch.nn.Linear(2, 1)
    optim = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    with precision.autocast():
        output = layer(torch.ones(1, 2))
    assert output.dtype is dtype
    precision.step(output.float().sum(), [optim])
    assert layer.weight.grad.dtype is torch.float32
    torch.testing.assert_close(layer.weight, before - 1)


class FakeScaler(torch.amp.GradScaler):
    """A scaler that works without CUDA."""

    def __init__(self):
        super().__init__("cpu", init_scale=1024.0)


def scaled() -> Precision:
    precision = Precision()
    precision.scaler = FakeScaler()
    return precision


def test_scaled_gradients_give_the_same_step_and_overflow_none():
    precision, used, unused = scaled(), torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optims = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (used, unused)]
    before = used.weight.detach().clone()
    assert precision.step(used(torch.ones(1, 2)).sum(), optims)  # the second has no gradient: left alone
    torch.testing.assert_close(used.weight, before - 1)
    optims[0].zero_grad()
    before, scale = used.weight.detach().clone(), precision.scaler.get_scale()
    precision.backward(used(torch.ones(1, 2)).sum())
    used.weight.grad.fill_(torch.inf)
    assert not precision.update(optims)
    assert torch.equal(used.weight, before) and precision.scaler.get_scale() == scale / 2


def test_state_is_kept():
    first, second = scaled(), scaled()
    layer = torch.nn.Linear(1, 1)
    first.step(layer(torch.ones(1, 1)).sum(), [torch.optim.SGD(layer.parameters(), lr=0.1)])
    first.scaler.update(64.0)
    second.backward(layer(torch.ones(1, 1)).sum())
    second.load_state_dict(first.state_dict())
    assert second.scaler.state_dict() == first.scaler.state_dict()
    plain = Precision()
    plain.load_state_dict(first.state_dict())
    assert plain.state_dict() == {}


def test_unknown_name():
    with pytest.raises(InputError, match='PREC to be one of fp32, fp16, amp, bf16 but got "half"'):
        Precision("half")


def test_a_trainer_takes_its_device(build):
    trainer = build()
    trainer.set_precision("amp")
    assert trainer.precision.dtype is torch.bfloat16
    trainer.train()
    assert trainer.evaluation.heads["main"]["accuracy"] > 60
