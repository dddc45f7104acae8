from pathlib import Path
from unittest import mock

import pytest
import yaml
from yacs.config import CfgNode

import trainers
from dassl.config import get_cfg_default
from trainers.dlrclip import DLRCLIP

FOLDER = Path(__file__).parents[3] / "configs" / "trainers" / "dlr"


@pytest.fixture
def cfg():
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    return cfg


def check(cfg):
    """Check the keys; with a backbone, which the defaults leave open."""
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME or "tiny"
    with mock.patch("trainers.base.clip_trainer.check_backbone"):  # the weights of others are not here
        DLRCLIP.check_settings(cfg)


def test_defaults_are_the_published_ones(cfg):
    check(cfg)
    node = cfg.TRAINER.DLRCLIP
    assert (node.CMA, node.GLR, node.SKD) == (True, True, True)
    assert (node.START, node.END, node.DIM, node.SCALE) == (5, 12, 32, 0.01)
    assert (node.GLR_DIM, node.RES_SCALE, node.LAMBDA, node.T, node.SMOOTHING) == (512, 0.01, 0.01, 2.0, 0.2)
    assert (node.FIXED_ALPHA, node.FIXED_WEIGHT, node.EPS, node.HEAD) == (None, None, 1e-4, "final")
    assert set(node.LOSS.values()) == {1.0}
    assert node.GLR_MODE == "dense"


def test_extending_twice_changes_nothing(cfg):
    cfg.TRAINER.DLRCLIP.DIM = 7
    cfg.DATASET.TEMPLATE = "{}"
    before = cfg.dump()
    trainers.extend_cfg(cfg)
    assert cfg.dump() == before


def test_plain_yacs_nodes_are_extended_in_kind():
    cfg = CfgNode({"TRAINER": {}, "INPUT": {}, "OPTIM": {}, "DATASET": {}})
    DLRCLIP.add_config(cfg)
    assert type(cfg.TRAINER.DLRCLIP) is CfgNode


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("CMA", None), "CMA to be True or False but got None"),
        (("CHECKPOINTING", 1), "CHECKPOINTING to be True or False but got 1"),
        (("COMPILE", "yes"), "COMPILE to be True or False but got 'yes'"),
        (("COMPILE_MODE", "fast"), "COMPILE_MODE to be one of default, reduce-overhead but got 'fast'"),
        (("COMPILE_MODE", "reduce-overhead"), "COMPILE to be True where .COMPILE_MODE is reduce-overhead"),
        (("TEXT_CHUNK", -1), "TEXT_CHUNK to be a whole number, at least 0, but got -1"),
        (("PREC", "fp8"), "PREC to be one of fp32, fp16, amp, bf16 but got 'fp8'"),
        (("HEAD", "best"), "HEAD to be one of clip, cma, glr, final, fused, robust, mixed but got 'best'"),
        (
            ("HEAD", "robust"),
            "HEAD to be one of clip, cma, glr, final, fused but got 'robust', which needs FUSION robust",
        ),
        (("TEXT_CTX_INIT", " "), "TEXT_CTX_INIT to be the words"),
        (("TEXT_CTX_INIT", "a photo of a {}."), "TEXT_CTX_INIT to be the words"),
        (("START", 0), "START to be a whole number, at least 1, but got 0"),
        (("START", 13), "START to be at most .END but got START 13 and END 12"),
        (("DIM", -1), "DIM to be a whole number"),
        (("GLR_DIM", 0), "GLR_DIM to be a whole number"),
        (("SHARED_DIM", 0), "SHARED_DIM to be a whole number"),
        (("GLR_MODE", "sparse"), "GLR_MODE to be one of dense, shared but got 'sparse'"),
        (("FUSION_DIM", 0), "FUSION_DIM to be a whole number"),
        (("SCALE", float("nan")), "SCALE to be a number, finite, but got nan"),
        (("RES_SCALE", float("inf")), "RES_SCALE to be a number"),
        (("LEARN_SCALE", 0), "LEARN_SCALE to be True or False but got 0"),
        (("GRAD_SCALING", "on"), "GRAD_SCALING to be True or False but got 'on'"),
        (("BETA_TIES", "largest"), "BETA_TIES to be one of weight, smallest but got 'largest'"),
        (("FIXED_ALPHA", 1.5), "FIXED_ALPHA to be a number, at least 0 and at most 1, but got 1.5"),
        (("FIXED_WEIGHT", "half"), "FIXED_WEIGHT to be a number, at least 0 and at most 1, but got 'half'"),
        (("LAMBDA", -0.1), "LAMBDA to be a number, at least 0, but got -0.1"),
        (("T", 0.0), "T to be a number, above 0, but got 0.0"),
        (("SMOOTHING", 1.0), "SMOOTHING to be a number, at least 0 and below 1, but got 1.0"),
        (("EPS", 0.0), "EPS to be a number, above 0"),
        (("LOSS.CE_CMA", -1.0), "DLRCLIP.LOSS.CE_CMA to be a number, at least 0, but got -1.0"),
    ],
)
def test_each_key_is_checked(cfg, pair, message):
    *path, last = pair[0].split(".")
    node = cfg.TRAINER.DLRCLIP
    for name in path:
        node = node[name]
    node[last] = pair[1]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check(cfg)


def test_gradient_scaling_needs_a_scale(cfg):
    cfg.TRAINER.DLRCLIP.GRAD_SCALING = True
    check(cfg)
    cfg.TRAINER.DLRCLIP.SCALE = 0.0
    with pytest.raises(ValueError, match="SCALE not to be 0 where .GRAD_SCALING is True"):
        check(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("VIEWS", -1, "Expected INPUT.VIEWS to be a whole number, at least 0, but got -1"),
        ("VIEWS", 2.0, "Expected INPUT.VIEWS to be a whole number"),
        ("VIEWS_MEMORY", -1.0, "Expected INPUT.VIEWS_MEMORY to be a number, at least 0, but got -1.0"),
    ],
)
def test_keys_of_the_views_are_checked(cfg, key, value, message):
    assert (cfg.INPUT.VIEWS, cfg.INPUT.VIEWS_MEMORY) == (0, 4.0)
    cfg.INPUT[key] = value
    with pytest.raises(ValueError, match=message):
        check(cfg)


def test_both_parts_off(cfg):
    cfg.merge_from_list(["TRAINER.DLRCLIP.CMA", False, "TRAINER.DLRCLIP.GLR", False])
    with pytest.raises(ValueError, match="nothing would be learnt"):
        check(cfg)


def test_not_extended():
    with pytest.raises(ValueError, match="call extend_cfg"):
        DLRCLIP.read_settings(CfgNode({"TRAINER": {}}))


def test_fixed_values_from_the_command_line(cfg):
    cfg.merge_from_list(["TRAINER.DLRCLIP.FIXED_ALPHA", "1", "TRAINER.DLRCLIP.FIXED_WEIGHT", "0.5"])
    check(cfg)
    assert cfg.TRAINER.DLRCLIP.FIXED_WEIGHT == 0.5
    cfg.merge_from_list(["TRAINER.DLRCLIP.FIXED_ALPHA", "None"])
    assert cfg.TRAINER.DLRCLIP.FIXED_ALPHA is None


FILES = {
    "vit_b16": "ViT-B/16",
    "vit_b16_cross": "ViT-B/16",
    "vit_b16_shared": "ViT-B/16",
    "vit_b32": "ViT-B/32",
    "rn50": "RN50",
    "rn101": "RN101",
    "tiny": "tiny",
    "tiny_shared": "tiny",
    "tiny_plus": "tiny",
    "vit_b16_plus": "ViT-B/16",
}


@pytest.mark.parametrize("stem", FILES)
def test_files_merge_and_pass_the_check(cfg, stem):
    cfg.merge_from_file(str(FOLDER / f"{stem}.yaml"))
    check(cfg)
    assert FILES[stem] == cfg.MODEL.BACKBONE.NAME
    assert cfg.TRAINER.NAME == "DLRCLIP"
    assert cfg.DATASET.NAME == ""
    batch_size = 32 if stem == "vit_b16_cross" else 16  # what the source trains ImageNet with, and everything else
    assert (cfg.OPTIM.NAME, cfg.OPTIM.LR_SCHEDULER, cfg.DATALOADER.TRAIN_X.BATCH_SIZE) == (
        "adamw",
        "cosine",
        batch_size,
    )
    text = (FOLDER / f"{stem}.yaml").read_text()
    assert text.startswith("# ")
    assert f"python train.py --trainer DLRCLIP --config-file configs/trainers/dlr/{stem}.yaml" in text


def test_every_file_is_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(FILES)


def test_the_base_file_uses_nothing_that_upstream_lacks():
    """vit_b16.yaml must merge into upstream's defaults as extended here: no inheritance, no key of ours alone."""
    tree = yaml.safe_load((FOLDER / "vit_b16.yaml").read_text())
    assert set(tree) == {"SEED", "DATASET", "DATALOADER", "INPUT", "MODEL", "OPTIM", "TRAIN", "TRAINER"}
    assert set(tree["OPTIM"]) <= {"NAME", "LR", "WEIGHT_DECAY", "MAX_EPOCH", "LR_SCHEDULER", "WARMUP_EPOCH"}
    assert set(tree["DATASET"]) == {"NUM_SHOTS"}
    assert set(tree["INPUT"]) <= {"SIZE", "INTERPOLATION", "PIXEL_MEAN", "PIXEL_STD", "TRANSFORMS", "RRCROP_SCALE"}
    assert set(tree["TRAINER"]) == {"NAME", "DLRCLIP"}
    assert isinstance(tree["OPTIM"]["LR"], float)
    assert isinstance(tree["OPTIM"]["WEIGHT_DECAY"], float)
