"""Configurations by trainer and short name."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY
from trainers.configs import FOLDER, configs_of, find_config, trainer_of, warn_if_for_another, without_config

TRAINERS = TRAINER_REGISTRY.registered_names()
FILES = sorted(FOLDER.glob("*/*.yaml"))


@functools.cache
def merged_trainer(path: Path) -> str:
    """TRAINER.NAME after the file was merged into the whole configuration."""
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    trainers.extend_cfg(cfg)
    cfg.merge_from_file(path)
    return cfg.TRAINER.NAME


def test_files_are_known_by_what_merging_them_gives():
    assert len(FILES) > 50 and {path: trainer_of(path) for path in FILES} == {p: merged_trainer(p) for p in FILES}


def test_every_file_is_found_by_its_trainer_and_name():
    found = {path for name in TRAINERS for path in configs_of(name).values()}
    assert found == set(FILES)  # else two of one trainer have one name
    assert all(find_config(merged_trainer(path), path.stem) == path for path in FILES)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_has_a_tiny_one_and_says_so(name):
    message = without_config(name)
    assert f"python train.py --trainer {name} --config tiny (" in message
    assert all(path.name in message for path in configs_of(name).values())


def test_errors_name_what_there_is():
    with pytest.raises(ValueError, match=r'one of rn50, tiny, vit_b16 for CoOp but got "tinny" \(did you mean "tiny"'):
        find_config("CoOp", "tinny")
    with pytest.raises(ValueError, match='got "configs/coop.yaml"; --config-file takes a path'):
        find_config("CoOp", "configs/coop.yaml")
    with pytest.raises(ValueError, match="left out, as there is no configuration for Mine"):
        find_config("Mine", "tiny")
    assert "--trainer" not in without_config("Mine") and "--config-file" in without_config("Mine")


def test_a_file_for_another_trainer_is_told(tmp_path, caplog):
    (tmp_path / "mine.yaml").write_text("SEED: 1\n")
    (tmp_path / "base.yaml").write_text("TRAINER:\n  NAME: CoOp\n")
    (tmp_path / "below.yaml").write_text("_BASE_: base.yaml\nTRAINER:\n  COOP:\n    N_CTX: 4\n")
    caplog.set_level(logging.WARNING)
    warn_if_for_another(tmp_path / "mine.yaml", "MMA")
    warn_if_for_another(tmp_path / "below.yaml", "CoOp")
    assert caplog.messages == []
    warn_if_for_another(tmp_path / "below.yaml", "MMA")
    assert caplog.messages == [f"{tmp_path / 'below.yaml'} is a configuration of CoOp but is used with MMA"]
