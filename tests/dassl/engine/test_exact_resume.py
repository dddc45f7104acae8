"""A run that was stopped between any two steps ends as the one that was not: bit by bit."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY, TrainerX, TrainerXU
from dassl.engine.hooks import results
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import InputError, files, load_checkpoint


class Cut(BaseException):
    pass


class Noisy(TrainerX):
    """Every step draws from all generators, and keeps something outside of its model."""

    images: list[str]

    def build_model(self):
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, self.num_classes))
        self.optim = build_optimizer(self.net, self.cfg.OPTIM)
        self.register_model("net", self.net, self.optim, build_lr_scheduler(self.optim, self.cfg.OPTIM))
        self.memory, self.images = 0.0, []

    def model_inference(self, input):
        return self.net(input.mean(dim=(2, 3)))

    def forward_backward(self, batch, other=None):
        self.images += [str(path) for part in (batch, other) if part for path in part["impath"]]
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        if other is not None:
            noise = noise + other["img"].mean()
        image = batch["img"] * (1 + 0.1 * noise)
        loss = F.cross_entropy(self.model_inference(image), batch["label"]) * (1 + 0.1 * self.memory)
        self.memory = 0.5 * self.memory + float(loss.detach())
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), "memory": self.memory}

    def run_state(self):
        return {"memory": self.memory}

    def load_run_state(self, state):
        self.memory = state["memory"]


class NoisyXU(TrainerXU, Noisy):  # type: ignore[misc]  # upstream's signatures of parse_batch_train
    """The same on pairs of batches; the unlabeled images last for less than an epoch."""


PAIRS = (
    *("OPTIM.MAX_EPOCH", 3, "OPTIM.MOMENTUM", 0.9, "TEST.FINAL_MODEL", "best_val"),
    *("INPUT.TRANSFORMS", ("random_flip", "colorjitter", "normalize"), "TRAIN.CHECKPOINT_STEPS", 1),
)
STEPS = 4  # of an epoch


@pytest.fixture(autouse=True)
def noisy(monkeypatch):
    monkeypatch.setattr(results, "describe", lambda device: {})  # asks git
    monkeypatch.setattr(TrainerX, "init_writer", lambda *arguments, **named: None)
    monkeypatch.setattr(TrainerXU, "init_writer", lambda *arguments, **named: None)
    for cls in (Noisy, NoisyXU):
        monkeypatch.setitem(TRAINER_REGISTRY._obj_map, cls.__name__, cls)


def cut_after(trainer, steps: int) -> None:
    """Train, and die within the step after that many."""
    step, done = trainer.forward_backward, 0

    def dying(*batches):
        nonlocal done
        if done == steps:
            random.random(), torch.rand(1)  # whatever the step had begun with
            raise Cut
        done += 1
        return step(*batches)

    trainer.forward_backward = dying
    with pytest.raises(Cut):
        trainer.train()


def outcome(trainer, folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["timing"]
    last = load_checkpoint(folder / "net" / "model.pth.tar-3")
    engine = last["engine"]
    for hook in ("Timing",):
        del engine["hooks"][hook]
    del engine["config"]
    return metrics, last, trainer.best_result


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


XU_BATCHES = ("DATALOADER.TRAIN_U.SAME_AS_X", False, "DATALOADER.TRAIN_U.BATCH_SIZE", 3)
CLASSES = ("DATALOADER.TRAIN_X.SAMPLER", "RandomClassSampler", "DATALOADER.TRAIN_X.N_INS", 2)


@pytest.mark.parametrize(
    ("name", "extra", "cuts"),
    [("Noisy", (), (1, 4, 6)), ("NoisyXU", XU_BATCHES, (3, 6)), ("NoisyXU", CLASSES, (2, 7))],
    ids=["X", "XU", "classes"],
)
def test_stopped_between_two_steps(build, tmp_path, name, extra, cuts):
    whole = build(name, *PAIRS, *extra, output="whole")
    whole.train()
    expected = outcome(whole, tmp_path / "whole")
    per_step = len(whole.images) // (3 * whole.num_batches)
    for steps in cuts:
        where = f"cut{steps}"
        cut_after(build(name, *PAIRS, *extra, output=where), steps)
        resumed = build(name, *PAIRS, *extra, output=where)
        resumed.train()
        assert same(outcome(resumed, tmp_path / where), expected), steps
        assert resumed.images == whole.images[steps * per_step :]


def test_dies_between_the_last_file_and_the_pointer_to_it(build, tmp_path):
    def trained(output: str):
        trainer = build("Noisy", *PAIRS, output=output)
        trainer.test = lambda split=None: float(trainer.epoch)  # the last epoch is the best
        trainer.train()
        return trainer

    def files_of(output: str):
        folder = tmp_path / output / "net"
        pointer = (folder / "checkpoint").read_text().strip()
        content = load_checkpoint(folder / pointer)
        del content["engine"]["hooks"]["Timing"], content["engine"]["config"]
        return pointer, content

    trained("whole")
    trained("died")
    assert files_of("whole")[0] == "model.pth.tar-3"
    (tmp_path / "died" / "net" / "checkpoint").write_text("model-best.pth.tar\n")
    (tmp_path / "died" / "DONE").unlink()
    trained("died")
    assert same(files_of("died"), files_of("whole"))


def test_images_that_were_seen_are_not_loaded(build, monkeypatch):
    from dassl.data import data_manager

    cut_after(build("Noisy", *PAIRS), 2)
    loaded: list[str] = []
    read = data_manager.read_image
    monkeypatch.setattr(data_manager, "read_image", lambda path: (loaded.append(path), read(path))[1])
    resumed = build("Noisy", *PAIRS)
    monkeypatch.setattr(resumed, "test", lambda split=None: 0.0)
    resumed.train()
    assert resumed.images == loaded and len(loaded) == 4 * (3 * STEPS - 2)


def test_loader_that_cannot_skip(build, tmp_path):
    """A trainer with a loader of its own: its order follows from the generators at the beginning of the epoch."""

    def own_loader(trainer):
        data = trainer.train_loader_x.dataset
        trainer.train_loader_x = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
        return trainer

    whole = own_loader(build("Noisy", *PAIRS, output="whole"))
    whole.train()
    cut_after(own_loader(build("Noisy", *PAIRS, output="cut")), 6)
    resumed = own_loader(build("Noisy", *PAIRS, output="cut"))
    resumed.train()
    assert resumed.images == whole.images[24:]
    assert same(outcome(resumed, tmp_path / "cut"), outcome(whole, tmp_path / "whole"))


def test_unseeded_run_goes_on_with_its_order(build, tmp_path):
    cut = build("Noisy", *PAIRS, "SEED", 5, "OPTIM.MAX_EPOCH", 1)
    cut.dm._seed = 77  # as if it had been drawn
    cut_after(cut, 2)
    resumed = build("Noisy", *PAIRS, "SEED", 5, "OPTIM.MAX_EPOCH", 1)
    resumed.train()
    assert resumed.dm._seed == 77 and len({*cut.images, *resumed.images}) == 16


# ---- which files there are


def names(folder, pattern="model*"):
    return sorted(path.name for path in folder.glob(pattern) if path.suffix != ".sha256")


def test_newest_are_kept_and_numbered_ones_stay(build, tmp_path):
    net = tmp_path / "run" / "net"
    pairs = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_STEPS", 1, "TRAIN.CHECKPOINT_FREQ", 1)
    cut_after(build("Noisy", *pairs, "TRAIN.CHECKPOINTS_KEPT", 3), 11)
    assert names(net) == [
        *("model-step.pth.tar-2-1", "model-step.pth.tar-2-2", "model-step.pth.tar-2-3"),
        *("model.pth.tar-1", "model.pth.tar-2"),
    ]
    assert len(list(net.glob("*.sha256"))) == 5
    build("Noisy", *pairs, "TRAIN.CHECKPOINTS_KEPT", 1).train()
    assert names(net) == ["model.pth.tar-1", "model.pth.tar-2", "model.pth.tar-3"]


def test_end_of_an_epoch_is_kept_by_default(build, tmp_path):
    cut_after(build("Noisy"), 5)
    assert names(tmp_path / "run" / "net") == ["model-step.pth.tar-1-0"]
    trainer = build("Noisy")
    trainer.train()
    assert trainer.start_epoch == 1


def test_minutes(build, tmp_path):
    cut_after(build("Noisy", "TRAIN.CHECKPOINT_MINUTES", 1e-9), 3)
    assert names(tmp_path / "run" / "net") == ["model-step.pth.tar-0-2", "model-step.pth.tar-0-3"]


# ---- damaged files


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_file_is_named_and_the_one_before_serves(build, tmp_path, caplog, damage):
    whole = build("Noisy", *PAIRS, output="whole")
    whole.train()
    cut_after(build("Noisy", *PAIRS), 6)
    net = tmp_path / "run" / "net"
    path = net / "model-step.pth.tar-1-2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[:-100], "altered": content, "empty": b""}[damage])
    resumed = build("Noisy", *PAIRS)
    resumed.train()
    assert any("model-step.pth.tar-1-2" in m and "checksum" in m for m in caplog.messages)
    assert len(resumed.images) == 4 * 7  # one step more
    assert same(outcome(resumed, tmp_path / "run"), outcome(whole, tmp_path / "whole"))


def test_all_damaged_begins_anew(build, tmp_path, caplog):
    cut_after(build("Noisy", *PAIRS), 3)
    for path in (tmp_path / "run" / "net").glob("model-step*[0-9]"):
        path.write_bytes(b"nothing")
    trainer = build("Noisy", *PAIRS)
    trainer.train()
    assert trainer.start_epoch == 0 and len(trainer.images) == 4 * 12
    assert any("None of the checkpoints" in m for m in caplog.messages)


def test_damaged_file_that_is_asked_for_is_an_error(build, tmp_path):
    build().train()
    path = tmp_path / "run" / "net" / "model.pth.tar-3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r'Expected ".*model\.pth\.tar-3" to have the checksum in .* it is damaged'):
        build().load_model(tmp_path / "run", epoch=3)
    path.with_name("model.pth.tar-3.sha256").write_text("not a sum\n")  # nothing is known of it then
    with pytest.raises(InputError, match=r"model\.pth\.tar-3"):
        build().load_model(tmp_path / "run", epoch=3)


def test_pointer_that_is_damaged_or_names_nothing(build, tmp_path, caplog):
    cut_after(build("Noisy", *PAIRS), 6)
    for content in (b"\xff\xfe", b"model-step.pth.tar-1-3\n"):
        (tmp_path / "run" / "net" / "checkpoint").write_bytes(content)
        trainer = build("Noisy", *PAIRS)
        assert trainer.resume_model_if_exist(tmp_path / "run") == 1 and trainer.progress.step == 2
    assert sum("Expected" in m and "/checkpoint" in m for m in caplog.messages) == 2


@pytest.mark.parametrize("content", ["../../other/net/model-best.pth.tar", "x" * 300, "model.pth.tar-" + "9" * 5000])
def test_pointer_that_leads_elsewhere_is_not_followed(build, tmp_path, caplog, content):
    build("Noisy", *PAIRS, output="other").train()
    cut_after(build("Noisy", *PAIRS), 6)
    (tmp_path / "run" / "net" / "checkpoint").write_text(content)
    trainer = build("Noisy", *PAIRS)
    assert trainer.resume_model_if_exist(tmp_path / "run") == 1 and trainer.progress.step == 2
    assert any("to name a checkpoint but got" in m for m in caplog.messages)


# ---- settings


def test_settings_that_change_the_result(build, tmp_path, caplog):
    cut_after(build("Noisy", *PAIRS), 6)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(InputError, match=r"differ \(OPTIM.LR: 0.2, it was 0.1\)"):
        build("Noisy", *PAIRS, "OPTIM.LR", 0.2).train()
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    trainer = build("Noisy", *PAIRS, "OPTIM.LR", 0.2, "DATALOADER.TRAIN_X.BATCH_SIZE", 6, "TRAIN.FORCE_RESUME", True)
    trainer.train()
    assert trainer.start_epoch == 1
    assert any("forced" in m and "BATCH_SIZE: 6, it was 4" in m for m in caplog.messages)
    assert any("The epoch begins anew" in m for m in caplog.messages)


def test_settings_that_do_not(build, caplog):
    cut_after(build("Noisy", *PAIRS), 6)
    caplog.set_level("INFO")
    trainer = build("Noisy", *PAIRS, "TRAIN.PRINT_FREQ", 3, "TEST.PREDICTIONS_MB", 1)
    trainer.train()
    assert any("TRAIN.PRINT_FREQ, which changes no result: 3, it was 10" in m for m in caplog.messages)
    assert trainer.start_epoch == 1


# ---- writes that fail


class Faults:
    """Lets one operation on files fail: opening to write, a first write (half of it is done), syncing, or renaming."""

    def __init__(self, monkeypatch, at: int | None) -> None:
        self.at = at
        self.seen: list[str] = []
        self._replace = os.replace
        monkeypatch.setattr(files, "open", self.open, raising=False)
        monkeypatch.setattr(os, "fsync", lambda handle: self.operation("sync", errno.ENOSPC))
        monkeypatch.setattr(os, "replace", self.replace)

    def operation(self, name: str, number: int) -> None:
        self.seen.append(name)
        if len(self.seen) - 1 == self.at:
            raise OSError(number, os.strerror(number))

    def replace(self, source, target):
        self.operation(f"rename to {Path(target).name}", errno.EACCES)
        self._replace(source, target)

    def open(self, path, mode="r", **named):
        if "r" in mode:
            return open(path, mode, **named)
        name = Path(path).name[:-37]  # without the number that is drawn
        self.operation(f"open {name}", errno.EACCES)
        stream = open(path, mode, **named)  # noqa: SIM115 (closed by the wrapper)
        write, faults = stream.write, self

        class Wrapped:
            first = True

            def write(self, data):
                if self.first:
                    self.first = False
                    if len(faults.seen) == faults.at:
                        write(data[: len(data) // 2])
                    faults.operation(f"write {name}", errno.ENOSPC)
                return write(data)

            def writelines(self, lines):
                for line in lines:
                    self.write(line)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                stream.close()

            def __getattr__(self, name):
                return getattr(stream, name)

        return Wrapped()


def check_files(folder: Path) -> None:
    """Every file that is there can be read, and no temporary one is left."""
    for path in folder.rglob("*"):
        assert not path.name.endswith(".tmp"), path
        if path.is_dir() or path.suffix == ".sha256":
            continue
        if path.name.startswith("model"):
            assert load_checkpoint(path)["epoch"] >= 0
            assert path.with_name(f"{path.name}.sha256").exists()
        elif path.suffix == ".json" or path.name == "DONE":
            json.loads(path.read_text())
        elif path.name == "checkpoint":
            assert (path.parent / path.read_text().strip()).exists()


def test_writes_fail_once_each(build, tmp_path, monkeypatch):
    """A fifth of all writes; with DLR_CLIP_FAULTS=all, every one."""
    pairs = ("OPTIM.MAX_EPOCH", 1, "TEST.FINAL_MODEL", "best_val", "TRAIN.CHECKPOINT_STEPS", 1)
    pairs += ("DATALOADER.TRAIN_X.BATCH_SIZE", 8, "TEST.PREDICTIONS_MB", 0)  # two steps

    def run(output: str, at: int | None = None) -> tuple[Faults, bool]:
        with monkeypatch.context() as patch:
            faults = Faults(patch, at)
            try:
                build("Noisy", *pairs, output=output).train()
            except OSError:
                return faults, True
            return faults, False

    def ends(output: str):
        metrics = json.loads((tmp_path / output / "metrics.json").read_text())
        last = load_checkpoint(tmp_path / output / "net" / "model.pth.tar-1")
        return {k: v for k, v in metrics.items() if k != "timing"}, last["state_dict"], last["optimizer"]

    whole, failed = run("whole")
    assert not failed and len(whole.seen) > 40
    every = 1 if os.environ.get("DLR_CLIP_FAULTS") == "all" else 5
    for at, name in list(enumerate(whole.seen))[::every]:
        output = f"fault{at}"
        faults, failed = run(output, at)
        assert faults.seen[at] == name and (failed or name == "sync"), name  # folders that cannot be synced are not
        check_files(tmp_path / output)
        assert failed is not (tmp_path / output / "DONE").exists()
        _, failed = run(output)
        assert not failed and same(ends(output), ends("whole")), name
        check_files(tmp_path / output)
