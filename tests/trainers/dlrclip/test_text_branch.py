import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from sharded_text_worker import CLASSES, gradients

from trainers.clip.text import SHARING_COST
from trainers.dlrclip.config import DLRCLIPConfig
from trainers.dlrclip.network import DLRCLIPNetwork
from trainers.dlrclip.text_branch import group_by_length
from trainers.modules.cross_modal_adapter import AdapterEdit

ROOT = Path(__file__).parents[3]


class TestGroups:
    def cost(self, lengths, groups, cost):
        return sum(len(group) * max(lengths[i] for i in group) + cost for group in groups)

    @pytest.mark.parametrize("cost", [1, 4, 30])
    def test_least_cost_of_all_partitions_by_length(self, cost):
        lengths = [5, 2, 9, 2, 3, 9, 4, 2]
        groups = group_by_length(lengths, cost=cost)
        assert sorted(itertools.chain(*groups)) == list(range(8))
        order = sorted(range(8), key=lambda i: lengths[i])
        every = [
            [order[a:b] for a, b in itertools.pairwise([0, *cuts, 8])]
            for n in range(8)
            for cuts in itertools.combinations(range(1, 8), n)
        ]
        assert self.cost(lengths, groups, cost) == min(self.cost(lengths, one, cost) for one in every)

    def test_one_group_where_groups_are_dear_or_all_are_alike(self):
        assert len(group_by_length([3, 9, 4], cost=100)) == 1
        assert len(group_by_length([4] * 10, cost=1)) == 1
        assert group_by_length([7]) == [[0]]

    def test_most(self):
        groups = group_by_length([3] * 7 + [40] * 4, most=3, cost=8)
        assert [len(group) for group in groups] == [3, 3, 1, 3, 1]
        assert sorted(itertools.chain(*groups)) == list(range(11))


def run(make_clip, images, labels, kind="vit", **options):
    """Loss and gradients of one step, and the bytes that autograd held between its forward and backward pass."""
    torch.manual_seed(0)
    settings = {"start": 2, "end": 4, "dim": 8, "scale": 0.5, "glr_dim": 8, **options}
    network = DLRCLIPNetwork(make_clip(kind), CLASSES * 8, ["a photo of a {}."], DLRCLIPConfig(**settings)).train()
    held = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (held.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}), x)[1], lambda x: x
    ):
        loss = sum(network.losses(network(images), labels).values())
    loss.backward()
    return loss.item(), {n: p.grad for n, p in network.learner.named_parameters()}, sum(held.values())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(
    "options",
    [{"text_chunk": 3}, {"text_chunk": 1000}, {"checkpointing": True}, {"text_chunk": 5, "checkpointing": True}],
)
def test_chunks_and_checkpointing_are_exact_and_hold_less(make_clip, images, labels, kind, options):
    loss, grads, held = run(make_clip, images, labels, kind)
    got_loss, got, got_held = run(make_clip, images, labels, kind, **options)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    everything = torch.cat([grad.flatten() for grad in grads.values()])
    difference = torch.cat([(got[name] - grad).flatten() for name, grad in grads.items()])
    assert difference.norm() <= 5e-6 * everything.norm()  # sums in another order, or by other threads, round otherwise
    assert got_held < 0.7 * held


def test_prompts_that_share_nothing_give_the_same_gradients(make_clip, images, labels, monkeypatch):
    loss, grads, _ = run(make_clip, images, labels)
    monkeypatch.setitem(SHARING_COST, "cpu", 10**6)
    loss_whole, grads_whole, _ = run(make_clip, images, labels)
    assert loss_whole == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_whole[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()) + 1e-9)


def test_the_activations_of_one_chunk_are_alive_at_a_time(make_clip, images, labels, monkeypatch):
    adapt = AdapterEdit.parallel
    seen = []

    def watch(self, block, x):
        if x.shape[-1] != 32:  # the image encoder's
            return adapt(self, block, x)
        if x.requires_grad:  # not what the first adapted block sees: that is a constant
            seen.append(weakref.ref(x))
        alive.append(sum(ref() is not None for ref in seen))
        return adapt(self, block, x)

    monkeypatch.setattr(AdapterEdit, "parallel", watch)
    most = {}
    for chunk in (0, 5, 10):
        alive = []
        seen.clear()
        run(make_clip, images, labels, text_chunk=chunk)
        most[chunk] = max(alive)
        assert len(alive) >= 5
    assert most[5] == most[10] <= 4  # two blocks behind the first adapted one, shared and own tokens, less the last's
    assert most[0] > most[5]


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    worker = [sys.executable, str(ROOT / "tests" / "helpers" / "sharded_text_worker.py")]
    processes = [
        subprocess.Popen(
            [*worker, str(rank), "2", str(tmp_path / "rendezvous"), str(tmp_path / "result.pt")],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    got, want = torch.load(tmp_path / "result.pt", weights_only=True), gradients(0, 1)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6 * max(1.0, float(grad.abs().max())), msg=name)
    assert any("text" in name for name in want)
