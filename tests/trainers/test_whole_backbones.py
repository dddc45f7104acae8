"""Every registered method on a backbone without blocks: it works, or says before anything is loaded that it cannot."""

from __future__ import annotations

import json

import pytest
import torch
from random_towers import known_towers

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY, build_trainer
from trainers.base.feature_trainer import FeatureTrainer
from trainers.clip import complete_input

pytest.importorskip("transformers", reason="pip install transformers")
TRAINERS = TRAINER_REGISTRY.registered_names()
NEEDS = "Expected MODEL.BACKBONE.NAME to be a plain CLIP "
SIGLIP = "open_clip:small-siglip"


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    with known_towers(tmp_path_factory.mktemp("towers"), ("small-siglip",)) as files:
        yield files


@pytest.fixture
def make_cfg(tmp_path):
    def make(name, *pairs, backbone=SIGLIP, weights=""):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_list(["TRAINER.NAME", name, "OUTPUT_DIR", str(tmp_path / "run"), "USE_CUDA", False, "SEED", 1])
        cfg.merge_from_list(["DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1, "OPTIM.MAX_EPOCH", 1])
        cfg.merge_from_list(["MODEL.BACKBONE.NAME", backbone, "MODEL.BACKBONE.WEIGHTS", str(weights)])
        cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "DATALOADER.TRAIN_X.BATCH_SIZE", 4, "TEST.NO_TEST", True])
        cfg.merge_from_list(["OPTIM.NAME", "adamw", "OPTIM.LR_SCHEDULER", "cosine"])
        node = TRAINER_REGISTRY.get(name).config_node()
        for key, most in (("VIEWS", 2), ("ITER_MM", 5), ("STEPS", 3)):
            if cfg.TRAINER.get(node, {}).get(key, 0) > most:
                cfg.TRAINER[node][key] = most
        cfg.merge_from_list(list(pairs))
        complete_input(cfg, ())
        cfg.freeze()
        return cfg

    return make


@pytest.mark.parametrize("name", TRAINERS)
def test_a_method_works_or_says_at_once_that_it_cannot(name, make_cfg, towers, monkeypatch):
    """What it says, it says by the name alone: the weights are never opened."""
    method = TRAINER_REGISTRY.get(name)
    with monkeypatch.context() as patch:
        patch.setattr("trainers.base.clip_trainer.check_backbone", lambda name, weights: None)
        try:
            method.check_settings(make_cfg(name, backbone="open_clip:ViT-B-16-SigLIP"))
            refused = ""
        except ValueError as error:
            refused = str(error)
    if refused:
        assert refused.startswith(NEEDS) and f"for {name}, which" in refused and "\n" not in refused
        assert "methods that take CLIP's final features work with it" in refused
        assert method.why_not_on(make_cfg(name)) and not method.why_not_on(make_cfg(name, backbone="ViT-B/16"))
        assert not issubclass(method, FeatureTrainer) or method.adapters == "needed" or not method.projected
        return
    assert issubclass(method, FeatureTrainer)
    trainer = build_trainer(make_cfg(name, weights=towers["small-siglip"]))
    trainer.train()
    trainer.set_model_mode("eval")
    with torch.no_grad():
        images = torch.rand(2, 3, 160, 160)
        heads = trainer.model_heads(images)
        network = trainer.network
        features = torch.nn.functional.normalize(network.clip.encode_image(images), dim=-1)
        want = network.clip.logit_scale * features @ network.learner.zeroshot.t()  # scale * cosine, without the bias
    assert all(torch.isfinite(logits).all() for logits in heads.values())
    torch.testing.assert_close(heads["clip"], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "pairs",
    [
        ("TRAINER.DLRCLIP.CMA", False, "TRAINER.DLRCLIP.GLR", False, "TRAINER.DLRCLIP.FUSION", "mixture"),
        ("TRAINER.DLRCLIP.CMA", False, "INPUT.VIEWS", 1),
    ],
)
def test_dlrclip_without_its_adapter_takes_features_alone(pairs, make_cfg, towers, tmp_path):
    trainer = build_trainer(make_cfg("DLRCLIP", *pairs, weights=towers["small-siglip"]))
    trainer.train()
    assert (tmp_path / "run" / "dlrclip").is_dir()
    batch = torch.rand(2, 3, 160, 160)
    trainer.set_model_mode("eval")
    with torch.no_grad():
        heads = trainer.model_heads(batch)
        features = torch.nn.functional.normalize(trainer.network.clip.encode_image(batch), dim=-1)
    want = trainer.network.clip.logit_scale * features @ trainer.network.zeroshot.t()
    torch.testing.assert_close(heads["clip"], want, atol=1e-4, rtol=1e-4)


def test_another_encoder_beside_such_a_backbone_takes_the_place_of_the_last_matrix(make_cfg, towers, tmp_path):
    """AMU-Tuning: features before the last matrix are refused, an auxiliary model is not."""
    from torchvision import models

    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "aux.pth")
    pairs = ("TRAINER.AMUTUNING.AUX", "resnet18", "TRAINER.AMUTUNING.AUX_WEIGHTS", str(tmp_path / "aux.pth"))
    build_trainer(make_cfg("AMUTuning", *pairs, weights=towers["small-siglip"])).train()


@pytest.mark.parametrize("name", ["ZeroshotCLIP", "LinearProbe", "TipAdapter"])
def test_adapters_in_the_image_encoder_are_refused(name, make_cfg, towers):
    cfg = make_cfg(name, "MODEL.IMO_WEIGHTS", "adapters.safetensors")
    with pytest.raises(ValueError, match=r"which corrects features within the image encoder \(MODEL.IMO_WEIGHTS\)"):
        TRAINER_REGISTRY.get(name).check_settings(cfg)


@pytest.mark.parametrize("prec", ["amp", "bf16", "fp16"])
def test_half_precision_gives_nearly_the_same_answers(prec, make_cfg, towers):
    images, found = torch.rand(4, 3, 160, 160), {}
    for precision in ("fp32", prec):
        cfg = make_cfg("ZeroshotCLIP", "TRAINER.ZEROSHOTCLIP.PREC", precision, weights=towers["small-siglip"])
        trainer = build_trainer(cfg)
        with torch.no_grad():
            found[precision] = trainer.network.encode(images)
    assert torch.cosine_similarity(found["fp32"], found[prec]).min() > 0.995


def test_features_are_kept_and_their_key_knows_the_architecture(make_cfg, towers, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    runs = []
    for number in range(2):
        caplog.clear()
        cfg = make_cfg("LinearProbe", "OUTPUT_DIR", str(tmp_path / str(number)), weights=towers["small-siglip"])
        trainer = build_trainer(cfg)
        trainer.train()
        runs.append(json.dumps({key: value.tolist() for key, value in trainer.network.learner.named_parameters()}))
        assert ("images from the cache in" in caplog.text) is bool(number)
    assert runs[0] == runs[1]
    form = trainer.network.encode.form
    assert "test_vit" in form and "timm " in form and "open_clip " in form
