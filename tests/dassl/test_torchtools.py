from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from dassl.utils import (
    InputError,
    count_num_param,
    init_network_weights,
    load_checkpoint,
    load_pretrained_weights,
    open_all_layers,
    open_specified_layers,
    resume_from_checkpoint,
    save_checkpoint,
)


def net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.BatchNorm1d(3)))


def state(model: nn.Module, epoch: int = 4, **entries) -> dict:
    return {"state_dict": model.state_dict(), "epoch": epoch, "optimizer": None, "scheduler": None, **entries}


def test_file_layout(tmp_path):
    save_checkpoint(state(net()), tmp_path / "model", is_best=True)
    save_checkpoint(state(net(), epoch=5), tmp_path / "model", model_name="mine.pth")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "checkpoint",
        "mine.pth",
        "mine.pth.sha256",
        "model-best.pth.tar",
        "model-best.pth.tar.sha256",
        "model.pth.tar-4",
        "model.pth.tar-4.sha256",
    ]
    assert (tmp_path / "model" / "checkpoint").read_text() == "mine.pth\n"
    assert load_checkpoint(tmp_path / "model" / "model-best.pth.tar")["epoch"] == 4


def test_wrapped_models_lose_their_prefix(tmp_path):
    model = net()
    save_checkpoint(state(nn.DataParallel(model)), tmp_path)
    loaded = load_checkpoint(tmp_path / "model.pth.tar-4")["state_dict"]
    assert list(loaded) == list(model.state_dict())
    save_checkpoint(state(nn.DataParallel(model)), tmp_path, remove_module_from_keys=False)
    assert all(key.startswith("module.") for key in load_checkpoint(tmp_path / "model.pth.tar-4")["state_dict"])


def test_only_plain_values_are_written(tmp_path):
    extras = {"a": np.float64(0.5), "b": (1, [None, "x"]), "c": OrderedDict(d=nn.Parameter(torch.ones(1)))}
    save_checkpoint(state(net(), extras=extras), tmp_path)
    loaded = load_checkpoint(tmp_path / "model.pth.tar-4")["extras"]
    assert loaded == {"a": 0.5, "b": (1, [None, "x"]), "c": {"d": torch.ones(1)}} and type(loaded["a"]) is float
    with pytest.raises(TypeError, match=r"Expected the checkpoint\['scheduler'\]\['after'\] to be .* but got .*StepLR"):
        optim = torch.optim.SGD(net().parameters())
        save_checkpoint(state(net()) | {"scheduler": {"after": torch.optim.lr_scheduler.StepLR(optim, 1)}}, tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(state(net()), tmp_path)
    old = (tmp_path / "model.pth.tar-4").read_bytes()

    def broken(content, stream):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(state(net()), tmp_path)
    assert (tmp_path / "model.pth.tar-4").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "model.pth.tar-4", "model.pth.tar-4.sha256"]


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_loading_refuses_all_but_plain_values(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {}, "x": Evil()}, path)
    with pytest.raises(InputError, match=r'Expected ".*evil\.pt" to hold tensors and plain values only'):
        load_checkpoint(path)
    assert capsys.readouterr().out == ""
    (tmp_path / "text.pt").write_text("no checkpoint at all")
    save_checkpoint(state(net()), tmp_path)
    half = (tmp_path / "model.pth.tar-4").read_bytes()[:-700]
    (tmp_path / "half.pt").write_bytes(half)
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("text.pt", "half.pt", "empty.pt"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(InputError, match="None"):
        load_checkpoint(None)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_upstream_s_live_scheduler_is_left_out(tmp_path, name):
    """What upstream writes for a schedule with warm-up: the wrapped scheduler, alive, with its optimizer."""
    model = nn.Linear(2, 2)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": successor, "warmup_epoch": 1, "last_epoch": 3},
        "val_result": None,
    }
    path = tmp_path / "model.pth.tar-3"
    torch.save(content, path)
    before = set(torch.serialization.get_safe_globals())
    loaded = load_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    assert loaded["scheduler"] is None
    assert torch.equal(loaded["state_dict"]["weight"], model.weight)
    assert loaded["optimizer"]["param_groups"][0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
    torch.save({**content, "optimizer": optimizer}, path)  # a live object anywhere else
    with pytest.raises(InputError, match="other Python objects"):
        load_checkpoint(path)


def test_resume(tmp_path):
    model = net()
    optim = torch.optim.AdamW(model.parameters(), lr=0.5)
    sched = torch.optim.lr_scheduler.StepLR(optim, 1)
    model(torch.randn(4, 2)).sum().backward()
    optim.step()
    sched.step()
    save_checkpoint(state(model, optimizer=optim.state_dict(), scheduler=sched.state_dict()), tmp_path)
    other = net()
    other_optim = torch.optim.AdamW(other.parameters(), lr=0.5)
    other_sched = torch.optim.lr_scheduler.StepLR(other_optim, 1)
    assert resume_from_checkpoint(tmp_path, other, other_optim, other_sched) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other_optim.param_groups[0]["lr"] == pytest.approx(0.05) and other_sched.last_epoch == 1
    assert torch.equal(other_optim.state[other.a.weight]["exp_avg"], optim.state[model.a.weight]["exp_avg"])


def test_resume_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="naming the checkpoint to resume but found none"):
        resume_from_checkpoint(tmp_path, net())
    (tmp_path / "checkpoint").write_text("gone.pth\n")
    with pytest.raises(InputError, match=r'but got "gone\.pth", which is not there'):
        resume_from_checkpoint(tmp_path, net())
    save_checkpoint(state(net()), tmp_path)
    with pytest.raises(InputError, match=r"model\.pth\.tar-4\" to fit the model but got: .*size mismatch"):
        resume_from_checkpoint(tmp_path, nn.Sequential(OrderedDict(a=nn.Linear(2, 4), b=nn.BatchNorm1d(4))))
    torch.save([1, 2], tmp_path / "model.pth.tar-4")
    (tmp_path / "model.pth.tar-4.sha256").unlink()
    with pytest.raises(InputError, match='to have an entry "state_dict" but got list'):
        resume_from_checkpoint(tmp_path, net())


def test_pretrained_weights(tmp_path, caplog):
    caplog.set_level("INFO")
    model = net()
    weights = {"module.a.weight": torch.full((3, 2), 7.0), "module.a.bias": torch.zeros(9), "other": torch.zeros(1)}
    torch.save({"state_dict": weights}, tmp_path / "wrapped.pt")
    bias = model.a.bias.detach().clone()
    load_pretrained_weights(model, tmp_path / "wrapped.pt")
    assert model.a.weight.eq(7).all() and torch.equal(model.a.bias, bias)
    assert caplog.messages[-1].endswith(": a.bias, other")
    torch.save({"other": torch.zeros(1)}, tmp_path / "none.pt")
    with pytest.raises(InputError, match=r"none of its 1 fits \(such as other\)"):
        load_pretrained_weights(model, tmp_path / "none.pt")
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="to hold a state dict but got Tensor"):
        load_pretrained_weights(model, tmp_path / "tensor.pt")


def test_counting():
    model = net()
    groups = [{"params": list(model.a.parameters())}, {"params": list(model.b.parameters())}]
    assert count_num_param(model) == count_num_param(params=model.parameters()) == count_num_param(params=groups) == 15
    with pytest.raises(ValueError, match="neither"):
        count_num_param()


def test_opening_layers():
    model = net()
    open_specified_layers(nn.DataParallel(model), "a")
    assert model.a.training and not model.b.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    open_all_layers(model)
    assert model.b.training and all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match='a layer among a, b but got "c"'):
        open_specified_layers(model, ["a", "c"])


@pytest.mark.parametrize("init_type", ["normal", "xavier", "kaiming", "orthogonal"])
def test_initialization(init_type):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Linear(200, 100, bias=False))
    model.append(nn.BatchNorm1d(100))
    nn.init.constant_(model[3].weight, 5.0)
    init_network_weights(model, init_type, gain=0.02)
    assert model[0].bias.eq(0).all() and model[3].weight.eq(1).all()
    weight = model[2].weight.detach()
    expected = {
        "normal": 0.02,
        "xavier": 0.02 * (2 / 300) ** 0.5,
        "kaiming": (2 / 200) ** 0.5,
        "orthogonal": 0.02 / 200**0.5,
    }
    assert weight.std() == pytest.approx(expected[init_type], rel=0.05)
    with pytest.raises(InputError, match='init_type to be one of .* but got "uniform"'):
        init_network_weights(model, "uniform")
