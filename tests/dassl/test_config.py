"""Config: the tree of defaults, merging and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from yacs.config import CfgNode as YacsNode

from dassl.config import CfgNode, clean_cfg, get_cfg_default
from dassl.utils import InputError


def leaves(node):
    return sum(leaves(value) if isinstance(value, YacsNode) else 1 for value in node.values())


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults_are_upstreams_and_eighteen_of_ours():
    cfg = get_cfg_default()
    assert (cfg.OPTIM.ADAM_EPS, cfg.OPTIM.LR_UNIT, cfg.DATALOADER.SKIP_BAD_IMAGES, cfg.DIST.TIMEOUT) == (
        1e-8,
        "epoch",
        False,
        10,
    )
    assert cfg.DATALOADER.CACHE_IMAGES == 0
    assert (cfg.DATASET.LABEL_NOISE, cfg.DATASET.FOREIGN, cfg.DATASET.FOREIGN_FROM) == (0.0, 0.0, "")
    assert cfg.TEST.PREDICTIONS_MB == 20
    assert (cfg.TRAIN.ON_NAN, cfg.TRAIN.ON_NAN_LIMIT) == ("stop", 10)
    assert (cfg.TRAIN.CHECKPOINT_STEPS, cfg.TRAIN.CHECKPOINT_MINUTES) == (0, 0)
    assert (cfg.TRAIN.CHECKPOINTS_KEPT, cfg.TRAIN.FORCE_RESUME) == (2, False)
    assert cfg.LOGGER == "tensorboard"
    assert not cfg.INPUT.SQUASH
    assert cfg.INPUT.DECODE == "full"
    assert leaves(cfg) == 135 + 18
    assert leaves(cfg.TRAINER) == 45
    assert cfg.OPTIM.WEIGHT_DECAY == 5e-4 and cfg.SEED == -1 and cfg.INPUT.SIZE == (224, 224)


def test_each_default_tree_is_its_own():
    first = get_cfg_default()
    first.OPTIM.LR = 1.0
    first.INPUT.PIXEL_MEAN.append(0.0)
    assert get_cfg_default().OPTIM.LR == 0.0003
    assert len(get_cfg_default().INPUT.PIXEL_MEAN) == 3


def test_every_node_is_ours():
    def walk(node):
        assert type(node) is CfgNode
        for value in node.values():
            if isinstance(value, YacsNode):
                walk(value)

    walk(get_cfg_default())
    walk(get_cfg_default().clone())


def test_strings_of_yaml_become_literals(tmp_path):
    cfg = get_cfg_default()
    cfg.merge_from_file(write(tmp_path / "a.yaml", "INPUT:\n  SIZE: (64, 32)\nOPTIM:\n  LR: 1e-5\n  STEPSIZE: [3]\n"))
    assert cfg.INPUT.SIZE == (64, 32)
    assert cfg.OPTIM.LR == 1e-5
    assert cfg.OPTIM.STEPSIZE == (3,)  # a list for a tuple


@pytest.mark.parametrize("value", ["1", 1])
def test_an_integer_is_a_float_too(value):
    cfg = get_cfg_default()
    cfg.merge_from_list(["OPTIM.LR", value])
    assert cfg.OPTIM.LR == 1.0 and isinstance(cfg.OPTIM.LR, float)


@pytest.mark.parametrize("text", ["123", "1e5", "(a, b)", "[1]"])
def test_a_text_setting_keeps_its_text(text):
    cfg = get_cfg_default()
    cfg.merge_from_list(["OUTPUT_DIR", text])
    assert text == cfg.OUTPUT_DIR


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("OPTIM.MAX_EPOCH", "1.5", "OPTIM.MAX_EPOCH to be of type int"),
        ("OPTIM.LR", "True", "OPTIM.LR to be of type float"),
        ("OPTIM.LR", "fast", "OPTIM.LR to be of type float"),
        ("USE_CUDA", "1", "USE_CUDA to be of type bool"),
        ("OPTIM", "3", "OPTIM to be a section"),
        ("OPTIM.LR.X", "3", "OPTIM.LR to be of type float"),
        ("OPTIM.LEARNING", "3", 'unknown key "OPTIM.LEARNING"'),
        ("OPTIM.MAX_EPOCHS", "3", 'did you mean "MAX_EPOCH"'),
        ("OPTIN.LR", "3", 'did you mean "OPTIM"'),
    ],
)
def test_a_wrong_override_is_named(key, value, told):
    with pytest.raises(InputError) as caught:
        get_cfg_default().merge_from_list([key, value])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_a_key_error_as_well():
    with pytest.raises(KeyError):
        get_cfg_default().merge_from_list(["NOSUCH", 1])


def test_overrides_come_in_pairs():
    with pytest.raises(InputError, match="pairs KEY VALUE"):
        get_cfg_default().merge_from_list(["OPTIM.LR"])


def test_base_chain_outer_first(tmp_path):
    write(tmp_path / "root.yaml", "SEED: 1\nOPTIM:\n  LR: 0.1\n  NAME: sgd\n")
    write(tmp_path / "sub" / "middle.yaml", "_BASE_: ../root.yaml\nSEED: 2\nOPTIM:\n  LR: 0.2\n")
    top = write(tmp_path / "top.yaml", "_BASE_: sub/middle.yaml\nSEED: 3\n")
    cfg = get_cfg_default()
    cfg.merge_from_file(str(top))
    assert (cfg.SEED, cfg.OPTIM.LR, cfg.OPTIM.NAME) == (3, 0.2, "sgd")
    assert "_BASE_" not in cfg


def test_base_cycle(tmp_path):
    write(tmp_path / "a.yaml", "_BASE_: b.yaml\n")
    write(tmp_path / "b.yaml", "_BASE_: a.yaml\n")
    with pytest.raises(InputError, match=r"cycle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        get_cfg_default().merge_from_file(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "text, told",
    [
        ("_BASE_: nosuch.yaml\n", "_BASE_ of"),
        ("_BASE_: [a.yaml]\n", "to be a file name"),
        ("OPTIM: [1\n", "to be YAML"),
        ("- 1\n", "to hold keys and values"),
        ("OPTIM:\n  LRR: 1\n", "LRR"),
        ("OPTIM:\n  NAME: 2020-01-01\n", "OPTIM.NAME to be of type str"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, told):
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(InputError) as caught:
        get_cfg_default().merge_from_file(path)
    assert told in str(caught.value)
    assert "wrong.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    cfg = get_cfg_default()
    with pytest.raises(InputError, match="nosuch"):
        cfg.merge_from_file(tmp_path / "nosuch.yaml")
    cfg.merge_from_file(write(tmp_path / "empty.yaml", "# nothing\n"))
    assert cfg == get_cfg_default()


def test_nodes_added_with_plain_yacs_merge_like_ours(tmp_path):
    cfg = get_cfg_default()
    cfg.TRAINER.COOP = YacsNode()  # what a CoOp-style extend_cfg does
    cfg.TRAINER.COOP.N_CTX = 16
    cfg.merge_from_file(write(tmp_path / "a.yaml", "TRAINER:\n  COOP:\n    N_CTX: 4\n"))
    assert cfg.TRAINER.COOP.N_CTX == 4
    with pytest.raises(InputError, match='did you mean "N_CTX"'):
        cfg.merge_from_list(["TRAINER.COOP.N_CTXX", 1])


def test_a_tree_that_admits_new_keys():
    cfg = CfgNode(new_allowed=True)
    cfg.merge_from_list(["A.B", "3"])
    assert cfg.A.B == 3


def test_frozen():
    cfg = get_cfg_default()
    cfg.freeze()
    with pytest.raises(AttributeError, match="frozen"):
        cfg.merge_from_list(["SEED", 1])
    with pytest.raises(AttributeError):
        cfg.OPTIM.LR = 1.0


def test_merge_from_other_cfg_copies():
    cfg, other = get_cfg_default(), get_cfg_default()
    other.INPUT.PIXEL_MEAN = [0.0, 0.0, 0.0]
    cfg.merge_from_other_cfg(other)
    other.INPUT.PIXEL_MEAN[0] = 9.0
    assert cfg.INPUT.PIXEL_MEAN == [0.0, 0.0, 0.0]


def test_clean_cfg():
    cfg = get_cfg_default()
    clean_cfg(cfg, "mme")
    assert set(cfg.TRAINER) == {"NAME", "MME"}


def test_dump_can_be_merged_again(tmp_path):
    cfg = get_cfg_default()
    cfg.merge_from_list(["INPUT.SIZE", "(64, 64)", "OPTIM.LR", "1e-5"])
    again = get_cfg_default()
    again.merge_from_file(write(tmp_path / "config.yaml", cfg.dump()))
    assert again == cfg


def test_each_dump_is_of_the_tree_as_it_is():
    cfg = get_cfg_default()
    for value in (1, 1.0, True, "1", [1], (1,), {"A": 1}, 1):
        cfg.INPUT.SIZE = CfgNode(value) if isinstance(value, dict) else value
        assert cfg.dump() == cfg.dump() == YacsNode.dump(cfg), value
    assert cfg.dump(default_flow_style=True) == YacsNode.dump(cfg, default_flow_style=True) != cfg.dump()


def all_leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, YacsNode):
            yield from all_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("key, default", list(all_leaves(get_cfg_default())))
def test_no_value_is_no_value(tmp_path, key, default):
    """A blank in YAML, or None on the command line, is refused for every key, with its default."""
    nested = ": {".join(key.split(".")) + ": " + "}" * key.count(".")
    path = write(tmp_path / "blank.yaml", nested)
    for merge in (
        lambda cfg: cfg.merge_from_file(path),
        lambda cfg: cfg.merge_from_list([key, "None"]),
        lambda cfg: cfg.merge_from_list([key, None]),
    ):
        cfg = get_cfg_default()
        with pytest.raises(
            InputError, match=rf"{key} to have a value of type {type(default).__name__} .* but got none"
        ):
            merge(cfg)


def test_a_setting_whose_default_is_none_may_be_given_back_to_it():
    cfg = get_cfg_default()
    cfg.OPTIM.EXTRA = None
    cfg.merge_from_list(["OPTIM.EXTRA", "0.5", "OPTIM.EXTRA", "None"])
    assert cfg.OPTIM.EXTRA is None


def test_a_section_whose_lines_are_commented_out_changes_nothing(tmp_path):
    cfg = get_cfg_default()
    cfg.merge_from_file(write(tmp_path / "a.yaml", "OPTIM:\n  # LR: 1.0\nINPUT:\nSEED: 3\n"))
    assert cfg.SEED == 3 and cfg.OPTIM == get_cfg_default().OPTIM and cfg.INPUT == get_cfg_default().INPUT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("OPTIM:\n  LR: 1.0\nSEED: 1\nOPTIM:\n  NAME: sgd\n", "OPTIM stands in line 1 and again in line 4"),
        ("OPTIM:\n  LR: 1.0\n  NAME: sgd\n  LR: 2.0\n", "LR stands in line 2 and again in line 4"),
        ("SEED: 1\n'SEED': 2\n", "SEED stands in line 1 and again in line 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, words):
    with pytest.raises(InputError, match=f"a.yaml.*{words}"):
        get_cfg_default().merge_from_file(write(tmp_path / "a.yaml", text))
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    with pytest.raises(InputError, match=words):
        get_cfg_default().merge_from_file(tmp_path / "b.yaml")


def test_anchors_and_merges_are_no_keys_that_stand_twice(tmp_path):
    text = "OPTIM: {LR: 1.0}\nDATALOADER:\n  TRAIN_X: &loader {BATCH_SIZE: 4}\n  TEST:\n    <<: *loader\n"
    cfg = get_cfg_default()
    cfg.merge_from_file(write(tmp_path / "a.yaml", text))
    assert cfg.DATALOADER.TEST.BATCH_SIZE == 4 and cfg.OPTIM.LR == 1.0


def test_merging_a_file_tells_its_keys_and_those_of_its_bases(tmp_path):
    write(tmp_path / "base.yaml", "SEED: 1\nOPTIM: {LR: 1.0, NAME: sgd}\n")
    write(tmp_path / "own.yaml", "_BASE_: base.yaml\nOPTIM: {LR: 2.0}\n")
    said = get_cfg_default().merge_from_file(tmp_path / "own.yaml")
    assert said == {"SEED": 1, "OPTIM.LR": 2.0, "OPTIM.NAME": "sgd"}
