"""torch.compile of the encoders, on the smallest CLIP there is: one block each."""

import shutil

import pytest
import torch
from random_clip import NAMES

from trainers.dlrclip import network
from trainers.dlrclip.config import DLRCLIPConfig
from trainers.dlrclip.network import DLRCLIPNetwork


@pytest.mark.parametrize(("mode", "grad_scaling"), [("default", False), ("reduce-overhead", True)])
def test_compiled_training_step_is_the_plain_one(make_clip, images, labels, monkeypatch, mode, grad_scaling):
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):  # then all but the code generator
        compile = torch.compile
        monkeypatch.setattr(network.torch, "compile", lambda function, mode: compile(function, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        clip = make_clip(vision_layers=1, text_layers=1)
        settings = {"start": 1, "end": 1, "dim": 8, "scale": 0.5, "glr_dim": 8, "grad_scaling": grad_scaling}
        settings |= {"compile": compiled, "compile_mode": mode if compiled else "default"}
        net = DLRCLIPNetwork(clip, NAMES, ["a photo of a {}."], DLRCLIPConfig(**settings)).train()
        loss = sum(net.losses(net(images), labels).values())
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in net.learner.named_parameters()}))
    (loss, grads), (got_loss, got) = results
    torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name
