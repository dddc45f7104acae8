"""What several processes run in the tests of runs in several processes: checks of what they tell each other, and runs.

    python two_processes.py SPEC.json      with torchrun, or with its variables set

SPEC: {"checks": bool, "runs": [arguments of train.py, ...]}. Rank 0 writes the losses and exit codes of the runs to
SPEC.losses.json. A check that fails ends the process with a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dassl.data.sharding import Share
from dassl.engine import HookBase, SimpleTrainer
from dassl.engine.base import TrainerBase
from dassl.engine.hooks import TensorBoard
from dassl.engine.parallel import average_gradients, copy_from_main, own_draws
from dassl.utils import InputError, distributed
from trainers.app import train
from trainers.features import FeatureLoader, FeatureSet, collect_features


class Recorder(HookBase):
    """Keeps the losses that hooks see."""

    losses: list[float] = []

    def after_step(self, trainer):
        self.losses.append(trainer.stats.summary["loss"])


def check_talking() -> None:
    me = distributed.rank()
    assert distributed.world_size() == 2 and distributed.is_main() == (me == 0)
    assert distributed.broadcast_object({"from": me}) == {"from": 0}
    assert distributed.gather_objects(me) == [0, 1]
    distributed.check_same("what is the same", 7)
    with pytest.raises(InputError, match="the same in all processes but rank 1 differs"):
        distributed.check_same("what differs", me)
    # Means: of 3 images and 1.
    assert distributed.all_reduce_mean(torch.tensor([float(me)]), weight=3 - 2 * me).item() == 0.25
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        whole = torch.arange(10).reshape(5, 2).to(dtype)
        for counts in ((3, 2), (5, 0)):  # a rank without rows brings a stand-in
            mine = whole[:3] if counts[0] == 3 else whole
            if me:
                mine = whole[3:] if counts[1] else whole[:1]
            assert torch.equal(distributed.gather_rows(mine, counts), whole)
    order = []
    with distributed.main_first():
        order.append(me)
    assert distributed.gather_objects(order) == [[0], [1]]
    with pytest.raises(ValueError if me == 0 else distributed.PeerLostError), distributed.main_first():
        raise ValueError("rank 0 alone comes here")


class Numbers(Dataset):
    """Seven images, each of one number."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"img": torch.tensor([float(index)]), "label": index % 3, "impath": f"{index}.png"}


class HalfKnown:
    """A slot that has features in one process alone."""

    def __init__(self, known):
        self.known, self.saved = known, None

    def load(self):
        return self.known

    def save(self, values):
        self.saved = values


def check_encoding() -> None:
    me, seen = distributed.rank(), []

    def encode(images):
        seen.extend(images.flatten().tolist())
        return torch.cat([images, images**2], dim=1)

    want = torch.stack([torch.arange(7.0), torch.arange(7.0) ** 2], dim=1)
    slot = HalfKnown(FeatureSet(want[None], torch.arange(7) % 3, []) if me else None)
    found = collect_features(DataLoader(Numbers(), batch_size=2), encode, 1, slot)
    assert sorted(seen) == ([2, 3, 6] if me else [0, 1, 4, 5])
    assert torch.equal(found.values, want[None]) and slot.saved is not None and torch.equal(slot.saved, want[None])
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and found.paths == [f"{number}.png" for number in range(7)]
    seen.clear()
    loader = FeatureLoader(DataLoader(Numbers(), batch_size=2), encode)
    for _ in range(2):
        batches = list(loader)
        assert torch.equal(torch.cat([batch["feature"] for batch in batches]), want)
    assert sorted(seen) == ([2, 3, 6] if me else [0, 1, 4, 5])
    seen.clear()
    few = collect_features(DataLoader(Numbers(), batch_size=7), encode)  # one batch for two processes
    assert torch.equal(few.values, want[None])


def check_gradients() -> None:
    """Two steps on parts of 2 and 1 images equal two steps on all 3, for a trainer's two ways to step."""
    me = distributed.rank()
    torch.manual_seed(0)
    images, labels = torch.randn(3, 4), torch.tensor([0, 1, 1])
    alone = nn.Linear(4, 2)
    start = {name: value.clone() for name, value in alone.state_dict().items()}
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(alone(images), labels).backward()
        optimizer.step()

    rows = slice(0, 2) if me == 0 else slice(2, 3)
    for by_hand in (False, True):
        model, unused = nn.Linear(4, 2), nn.Linear(1, 1)
        if me == 0:
            model.load_state_dict(start)
        copy_from_main([model, None], frozen=True)
        optimizer = torch.optim.AdamW([*model.parameters(), *unused.parameters()], lr=0.1)
        trainer = TrainerBase()
        trainer.register_model("model", model, optimizer)
        trainer.share = Share((2, 1), me)
        for _ in range(2):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            if by_hand:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            else:
                trainer.model_backward_and_update(loss)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert all(p.grad is None for p in unused.parameters())
        weights = distributed.gather_objects(model.weight.tolist())
        assert weights[0] == weights[1]  # bit by bit
    # The centre of a step, and a parameter that only one rank's part concerns.
    assert torch.allclose(trainer.all_reduce_mean(images[rows].mean(0)), images.mean(0))
    lonely = nn.Parameter(torch.zeros(3))
    if me == 1:
        lonely.grad = torch.ones(3)
    average_gradients([lonely])
    assert lonely.grad is not None and lonely.grad.tolist() == [0.5, 0.5, 0.5]


def check_draws() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with own_draws():
        drawn = distributed.gather_objects(torch.rand(1).item())
    assert drawn[0] == expected[0].item() != drawn[1]
    assert distributed.gather_objects(torch.rand(1).item()) == [expected[1].item()] * 2


def check_lost_numbers() -> None:
    """A loss that is NaN on one rank leaves the step out on both; the next one is made, alike."""
    me = distributed.rank()
    model = nn.Linear(2, 1)
    copy_from_main([model], frozen=True)
    trainer = TrainerBase()
    trainer.register_model("model", model, torch.optim.AdamW(model.parameters(), lr=0.1))
    for lost in (True, False):
        before = model.weight.detach().clone()
        trainer.guard.begin()
        loss = model(torch.ones(1, 2) * (me + 1)).sum()
        trainer.model_backward_and_update(loss * torch.nan if lost and me == 1 else loss)
        assert (trainer.guard.fault == "the loss") == lost == torch.equal(model.weight, before)
    weights = distributed.gather_objects(model.weight.tolist())
    assert weights[0] == weights[1]


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    if spec["checks"]:
        distributed.connect()
        distributed.start(use_cuda=False, minutes=1)
        for check in (check_talking, check_encoding, check_gradients, check_draws, check_lost_numbers):
            check()
        distributed.stop()
    hooks = SimpleTrainer.build_hooks
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTrainer, "build_hooks", lambda self: [*hooks(self), Recorder()])
        patch.setattr(TensorBoard, "_pictures", lambda *arguments: None)  # most of a small run's time
        for argv in spec["runs"]:
            Recorder.losses = []
            code = train.main(argv)
            results.append({"code": code, "losses": Recorder.losses})
    if os.environ["RANK"] == "0":
        Path(path).with_suffix(".losses.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
