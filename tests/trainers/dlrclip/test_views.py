import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dassl.engine import build_trainer
from trainers.app.prediction import ClassesOnly
from trainers.dlrclip import DLRCLIP
from trainers.dlrclip.config import DLRCLIPConfig
from trainers.dlrclip.network import DLRCLIPNetwork
from trainers.features.kept_views import GIB, FrozenPart, FrozenViews, ViewLoader
from trainers.features.views import SeededViews

from .conftest import NAMES, Uncached, epochs

AUGMENTED = ("INPUT.TRANSFORMS", ("random_resized_crop", "normalize"), "SEED", 3)
NO_TEST = ("TEST.NO_TEST", True)
RAM, DISK = ("INPUT.VIEWS_MEMORY", 4.0), ("INPUT.VIEWS_MEMORY", 0.0)


@pytest.mark.parametrize(
    ("where", "pairs"),
    [
        (RAM, ()),
        (DISK, ()),
        (RAM, ("TRAINER.DLRCLIP.START", 1)),
        (DISK, ("TRAINER.DLRCLIP.START", 4, "TRAINER.DLRCLIP.END", 4)),
        (DISK, ("TRAINER.DLRCLIP.PREC", "bf16")),
        (RAM, ("TRAINER.DLRCLIP.PREC", "amp")),
        (RAM, ("TRAINER.DLRCLIP.CMA", False)),
    ],
)
def test_losses_are_those_of_the_same_images_uncached(make, where, pairs):
    cached = make("INPUT.VIEWS", 2, *AUGMENTED, *where, *pairs)
    got, order = epochs(cached, cached.train_loader_x, 3)
    assert cached.train_loader_x.store.on_disk == (where == DISK)
    plain = make(*AUGMENTED, *pairs, out="plain")
    want, _ = epochs(plain, Uncached(plain, 2, 3, order), 3)
    assert got == pytest.approx(want, rel=1e-5)
    assert len(got) == 12 and sorted(sum(order[:4], [])) == list(range(20))
    assert order[:4] != order[4:8]


def test_each_view_is_encoded_once(make):
    trainer = make("INPUT.VIEWS", 2, *AUGMENTED)
    loader = trainer.train_loader_x
    encode, encoded = loader._encode, []
    loader._encode = lambda images: (encoded.append(len(images)), encode(images))[1]
    for epoch, want in enumerate([20, 20, 0, 0]):
        loader.set_epoch(epoch)
        encoded.clear()
        batches = list(loader)
        assert sum(encoded) == want
        assert [len(batch["label"]) for batch in batches] == [5] * 4
    assert loader._reader is None
    loader.close()
    assert loader.store.features is None
    assert len(list(loader)) == 4  # begins anew


def test_a_pass_that_was_left_early_is_gone_on_with(make):
    loader = make("INPUT.VIEWS", 1, *AUGMENTED).train_loader_x
    first = next(iter(loader))
    assert int(loader.store.known.sum()) == 5
    everything = {int(i): f for batch in loader for i, f in zip(batch["index"], batch["feature"], strict=True)}
    assert all(torch.equal(everything[int(i)], f) for i, f in zip(first["index"], first["feature"], strict=True))


def test_order_and_views_follow_seed_and_epoch(make):
    def run(*pairs, out):
        trainer = make("INPUT.VIEWS", 2, *AUGMENTED, *pairs, out=out)
        return epochs(trainer, trainer.train_loader_x, 2)

    first, again, other = run(out="a"), run(out="b"), run("SEED", 4, out="c")
    assert first == again
    assert first[1] != other[1]


def test_resuming_gives_the_uninterrupted_run(make, tmp_path):
    pytest.importorskip("dassl.engine.hooks")  # ours: upstream draws other batches after resuming
    pairs = ("INPUT.VIEWS", 2, *AUGMENTED, *DISK, "OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1, *NO_TEST)
    whole = make(*pairs)
    whole.train()
    want = whole.network.learner.state_dict()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    folder = tmp_path / "again" / "dlrclip"
    (folder / "model.pth.tar-3").unlink()
    (folder / "model.pth.tar-2").unlink()
    (folder / "checkpoint").write_text("model.pth.tar-1\n")
    resumed = make(*pairs, out="again")
    resumed.train()
    got = resumed.network.learner.state_dict()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_disk(make, tmp_path, fails):
    trainer = make("INPUT.VIEWS", 1, *AUGMENTED, *DISK, "OPTIM.MAX_EPOCH", 2, *NO_TEST)
    step, seen = trainer.forward_backward, []

    def watched(batch):
        seen.append((trainer.train_loader_x.store.on_disk, {p.name for p in (tmp_path / "run").iterdir()}))
        if fails and len(seen) == 6:
            raise RuntimeError("interrupted")
        return step(batch)

    trainer.forward_backward = watched
    if fails:
        with pytest.raises(RuntimeError, match="interrupted"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.train_loader_x.store.hidden is None  # given back
    assert all(on_disk for on_disk, _ in seen)
    plain = make(*AUGMENTED, "OPTIM.MAX_EPOCH", 2, *NO_TEST, out="plain")
    plain.train()
    ordinary = {p.name.split(".tfevents")[0] for p in (tmp_path / "plain").rglob("*")}
    assert {p.name.split(".tfevents")[0] for p in (tmp_path / "run").rglob("*")} <= ordinary
    assert set().union(*(names for _, names in seen)) <= {p.name for p in (tmp_path / "plain").iterdir()}


def test_budget_counts_features_and_hidden_of_all_views(tmp_path):
    part = FrozenPart(torch.rand(2, 8), torch.rand(2, 3, 4).bfloat16())
    size = 10 * (8 * 4 + 3 * 4 * 2)
    for budget, on_disk in ((size, False), (size - 1, True)):
        store = FrozenViews(10, budget, str(tmp_path))
        store.put(torch.tensor([7, 0]), part)
        assert store.on_disk == on_disk
        got = store.take(torch.tensor([0, 7]), torch.device("cpu"))
        assert torch.equal(got.features, part.features.flip(0)) and torch.equal(got.hidden, part.hidden.flip(0))
    assert list(tmp_path.iterdir()) == []


def test_no_room(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    store = FrozenViews(10, 0, str(tmp_path))
    with pytest.raises(ValueError, match=r"Expected room for .* beyond INPUT.VIEWS_MEMORY, but got.*No space left"):
        store.put(torch.tensor([0]), FrozenPart(torch.rand(1, 8), None))


def test_a_configuration_without_the_keys(make_cfg):
    cfg = make_cfg()
    cfg.defrost()
    del cfg.INPUT["VIEWS"], cfg.INPUT["VIEWS_MEMORY"]
    cfg.freeze()
    assert "img" in next(iter(build_trainer(cfg).train_loader_x))


class Noise(Dataset):
    """Six images that are drawn anew whenever they are read."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"img": torch.randn(3, 32, 32), "label": i % 5}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("workers", [0, 1])
def test_other_encoders_and_readers(make_clip, names, kind, workers, tmp_path):
    torch.manual_seed(0)
    network = DLRCLIPNetwork(
        make_clip(kind), names, ["{}"], DLRCLIPConfig(start=2, end=4, dim=8, scale=0.5, glr_dim=8)
    ).train()
    data = Noise()
    items = [SimpleNamespace(label=i % 5, impath=str(i)) for i in range(6)]
    plain = DataLoader(data, batch_size=4, num_workers=workers)
    views = ViewLoader(plain, items, network.frozen_part, 2, 5, 4 * GIB, str(tmp_path), torch.device("cpu"))
    want = SeededViews(data, 2, 5)
    for epoch in range(4):
        views.set_epoch(epoch)
        for batch in views:
            images = torch.stack([want[epoch % 2 * 6 + int(i)]["img"] for i in batch["index"]])
            assert batch["impath"] == [str(int(i)) for i in batch["index"]]
            got = network(features=batch["feature"], hidden=batch["hidden"])
            for name, value in network(images).items():
                torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-4)


def test_a_trainer_without_images(make_cfg):
    """As predict.py builds it from the configuration of a run with views."""
    trainer = DLRCLIP(make_cfg("INPUT.VIEWS", 2), ClassesOnly(NAMES, None))
    trainer.set_model_mode("eval")
    assert trainer.model_heads(torch.zeros(1, 3, 32, 32))["final"].shape == (1, 5)
