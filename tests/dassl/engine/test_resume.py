"""Going on with a run that was cut short."""

from __future__ import annotations

import json

import pytest
import torch

from dassl.utils import InputError


class Cut(Exception):
    pass


def cut_in_epoch(trainer, epoch: int) -> None:
    """Train, and die in the middle of an epoch (counted from 1)."""
    step = trainer.forward_backward

    def dying(batch):
        if trainer.epoch + 1 == epoch and trainer.batch_idx == 1:
            raise Cut
        return step(batch)

    trainer.forward_backward = dying
    with pytest.raises(Cut):
        trainer.train()


PAIRS = ("TRAIN.CHECKPOINT_FREQ", 1, "OPTIM.MAX_EPOCH", 5, "OPTIM.MOMENTUM", 0.9)
WARM = ("OPTIM.WARMUP_EPOCH", 2, "OPTIM.WARMUP_TYPE", "linear")


@pytest.mark.parametrize("final", ["last_step", "best_val"])
@pytest.mark.parametrize("warm", [(), WARM], ids=["plain", "warm-up"])
def test_ends_like_the_uninterrupted_run(build, tmp_path, final, warm):
    pairs = (*PAIRS, *warm, "TEST.FINAL_MODEL", final)
    whole = build("Linear", *pairs, output="whole")
    whole.train()
    cut_in_epoch(build("Linear", *pairs, output="cut"), 4)
    assert not (tmp_path / "cut" / "DONE").exists()
    resumed = build("Linear", *pairs, output="cut")
    resumed.train()
    assert resumed.start_epoch == 3
    assert torch.equal(resumed.net.weight, whole.net.weight) and torch.equal(resumed.bias.weight, whole.bias.weight)
    assert resumed.best_result == whole.best_result
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("cut", "whole"))
    for key in ("accuracy", "test", "train", "selected", "epochs"):
        assert ours[key] == theirs[key]


def test_learning_rates_go_on(build):
    def recorded(trainer) -> list[float]:
        rates: list[float] = []
        step = trainer.forward_backward

        def recording(batch):
            if trainer.batch_idx == 0:
                rates.append(trainer.get_current_lr())
            return step(batch)

        trainer.forward_backward = recording
        return rates

    whole = build("Linear", *PAIRS, *WARM, output="whole")
    expected = recorded(whole)
    whole.train()
    cut_in_epoch(build("Linear", *PAIRS, *WARM, output="cut"), 4)
    resumed = build("Linear", *PAIRS, *WARM, output="cut")
    rates = recorded(resumed)
    resumed.train()
    assert len(set(expected)) == 5 and rates == pytest.approx(expected[3:])


def test_a_finished_run_is_only_tested_again(build, tmp_path, caplog):
    build().train()
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())
    again = build()
    caplog.set_level("INFO")
    again.train()
    assert "Nothing left to train: 3 of 3 epochs are done" in caplog.messages
    second = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {k: v for k, v in first.items() if k != "timing"} == {k: v for k, v in second.items() if k != "timing"}
    assert second["timing"]["train_seconds"] == first["timing"]["train_seconds"]
    assert (tmp_path / "run" / "DONE").exists()


def test_resume_from_another_folder(build, tmp_path):
    build(output="first").train()
    longer = ("RESUME", str(tmp_path / "first"), "OPTIM.MAX_EPOCH", 5)
    with pytest.raises(InputError, match=r"differ \(OPTIM.MAX_EPOCH: 5, it was 3\): .* or force it"):
        build("Linear", *longer, output="second").train()
    assert not (tmp_path / "second").exists()
    trainer = build("Linear", *longer, "TRAIN.FORCE_RESUME", True, output="second")
    trainer.train()
    assert trainer.start_epoch == 3 and (tmp_path / "second" / "net" / "model.pth.tar-5").is_file()


def test_a_run_of_another_recipe_is_not_gone_on_with(build, tmp_path, monkeypatch):
    build().train()
    first = type(build())
    monkeypatch.setattr(first, "recipe", 2)
    with pytest.raises(InputError, match="made by recipe 2 of Linear but got 1, of another version"):
        build().train()
    build("Linear", "TRAIN.FORCE_RESUME", True).train()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["recipe"] == 2


def test_a_folder_given_to_resume_from_must_have_something(build, tmp_path):
    trainer = build("Linear", "RESUME", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match='Expected RESUME to be a folder with "net/checkpoint" in it'):
        trainer.train()


def test_dies_between_the_files_of_two_models(build, tmp_path):
    build("Linear", *PAIRS).train()
    (tmp_path / "run" / "bias" / "checkpoint").write_text("model.pth.tar-4\n")
    (tmp_path / "run" / "bias" / "model.pth.tar-5").unlink()
    trainer = build("Linear", *PAIRS)
    assert trainer.resume_model_if_exist(tmp_path / "run") == 4
    for old in (tmp_path / "run" / "bias").glob("model.pth.tar-[123]"):
        old.unlink()
    (tmp_path / "run" / "net" / "model.pth.tar-4").unlink()
    with pytest.raises(InputError, match=r"to be of the same epoch but got epochs \[4, 5\]"):
        trainer.resume_model_if_exist(tmp_path / "run")


def test_one_model_without_checkpoint_means_from_scratch(build, tmp_path):
    build().train()
    (tmp_path / "run" / "bias" / "checkpoint").unlink()
    assert build().resume_model_if_exist(tmp_path / "run") == 0


def test_best_result_of_a_file_without_engine_state(build, tmp_path, caplog):
    build("Linear", "TEST.FINAL_MODEL", "best_val").train()
    for path in tmp_path.glob("run/*/model*"):
        if path.suffix == ".sha256":  # upstream has none
            path.unlink()
            continue
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["engine"]
        torch.save(checkpoint, path)
    best = torch.load(tmp_path / "run" / "net" / "model-best.pth.tar", weights_only=True)["val_result"]
    trainer = build("Linear", "TEST.FINAL_MODEL", "best_val")
    trainer.train()
    assert trainer.best_result == best
    assert [m for m in caplog.messages if "does not tell its settings" in m]


def test_load_model_says_what_there_is(build, tmp_path, caplog):
    trained = build()
    trained.train()
    fresh = build()
    with pytest.raises(FileNotFoundError, match=r"model-best\.pth\.tar\" but found .*model\.pth\.tar-3 there"):
        fresh.load_model(tmp_path / "run")
    caplog.set_level("INFO")
    fresh.load_model(tmp_path / "run", epoch=3)
    assert "val_result=none" in caplog.messages[-1]
    assert torch.equal(fresh.net.weight, trained.net.weight)
    fresh.load_model("")
    assert "skipped" in caplog.messages[-1]


def test_a_checkpoint_that_does_not_fit_is_refused(build, tmp_path):
    build().train()
    path = tmp_path / "run" / "net" / "model.pth.tar-3"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {"weight": torch.zeros(5, 3)}
    torch.save(checkpoint, path)
    path.with_name(path.name + ".sha256").unlink()
    with pytest.raises(InputError, match=r'Expected ".*model\.pth\.tar-3" to fit the model but got'):
        build().load_model(tmp_path / "run", epoch=3)
    with pytest.raises(InputError, match="to fit the model"):
        build().train()
