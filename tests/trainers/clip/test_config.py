from yacs.config import CfgNode

from trainers.clip import add_clip_config


def test_keys_are_added_once():
    cfg = CfgNode({"MODEL": {"BACKBONE": {"NAME": "tiny"}}, "DATASET": {"NAME": "Digits"}})
    add_clip_config(cfg)
    assert cfg.MODEL.BACKBONE.WEIGHTS == "" and cfg.DATASET.TEMPLATE == ""
    cfg.DATASET.TEMPLATE = "a {}"
    add_clip_config(cfg)
    assert cfg.DATASET.TEMPLATE == "a {}"
    cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", "x.pt"])
    assert cfg.MODEL.BACKBONE.WEIGHTS == "x.pt"
