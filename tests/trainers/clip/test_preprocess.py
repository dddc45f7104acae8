"""What a backbone wants of images, where the configuration leaves it open; and the activation of its weights."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from dlr_clip_cli.train import parse_args
from trainers.app import train
from trainers.app.configuration import setup_cfg
from trainers.clip import load_clip, preprocessing_of, tell_preprocessing
from trainers.clip.load import activation_of_origin

ROOT = Path(train.__file__).parents[2]
OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
LAION = "open_clip:ViT-L-14/laion2b_s32b_b82k"


def cfg_of(*words: str):
    return setup_cfg(parse_args(["--output-dir", "x", *words]))


def config(folder: str, name: str) -> list[str]:
    return ["--trainer", "LinearProbe", "--config-file", str(ROOT / f"configs/trainers/{folder}/{name}.yaml")]


def test_every_known_backbone_has_the_preprocessing_that_open_clip_states():
    for model, tag in (("ViT-L-14", "laion2b_s32b_b82k"), ("ViT-B-32", "openai"), ("ViT-B-16", "dfn2b")):
        own, stated = preprocessing_of(f"open_clip:{model}/{tag}"), open_clip.get_pretrained_cfg(model, tag)
        assert own.PIXEL_MEAN == tuple(stated["mean"]) and own.PIXEL_STD == tuple(stated["std"])
        assert own.INTERPOLATION == stated["interpolation"] and own.SIZE == (224, 224)
    assert preprocessing_of("tiny").SIZE == (64, 64)


def test_another_backbone_brings_its_own_values():
    own = cfg_of(*config("linear_probe", "vit_b16")).INPUT
    assert (own.PIXEL_MEAN, own.SIZE) == (OPENAI_MEAN, (224, 224))
    other = cfg_of(*config("linear_probe", "vit_b16"), "MODEL.BACKBONE.NAME", LAION).INPUT
    assert other.PIXEL_MEAN == other.PIXEL_STD == [0.5, 0.5, 0.5] and other.SIZE == (224, 224)
    flag = cfg_of(*config("linear_probe", "vit_b16"), "--backbone", "tiny").INPUT
    assert (flag.SIZE, flag.PIXEL_MEAN) == ((64, 64), OPENAI_MEAN)


def test_what_is_given_stays(tmp_path):
    pair = ("INPUT.PIXEL_MEAN", "[0.1, 0.2, 0.3]")
    given = cfg_of(*config("linear_probe", "vit_b16"), "MODEL.BACKBONE.NAME", LAION, *pair).INPUT
    assert given.PIXEL_MEAN == [0.1, 0.2, 0.3] and given.PIXEL_STD == [0.5, 0.5, 0.5]
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"MODEL: {{BACKBONE: {{NAME: '{LAION}'}}}}\nINPUT: {{PIXEL_STD: [0.4, 0.4, 0.4]}}\n")
    own_file = cfg_of("--trainer", "LinearProbe", "--config-file", str(mine)).INPUT
    assert own_file.PIXEL_STD == [0.4, 0.4, 0.4] and own_file.PIXEL_MEAN == [0.5, 0.5, 0.5]


def test_without_a_config_file_images_are_normalized():
    node = cfg_of("--trainer", "LinearProbe", "--backbone", "tiny").INPUT
    assert node.TRANSFORMS == ("normalize",) and node.INTERPOLATION == "bicubic" and node.SIZE == (64, 64)
    assert node.PIXEL_MEAN == OPENAI_MEAN
    flag = cfg_of("--trainer", "LinearProbe", "--backbone", "tiny", "--transforms", "random_flip").INPUT
    assert flag.TRANSFORMS == ("random_flip",)


def test_which_values_are_taken_is_said(caplog):
    caplog.set_level("INFO")
    tell_preprocessing(cfg_of(*config("linear_probe", "tiny")))
    assert "64 x 64 pixels, bicubic, mean (0.48145466" in caplog.text and "(its own)" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    tell_preprocessing(
        cfg_of(*config("linear_probe", "tiny"), "INPUT.PIXEL_STD", "[1, 1, 1]", "INPUT.TRANSFORMS", "()")
    )
    warning = caplog.records[-1]
    assert warning.levelname == "WARNING" and "INPUT.PIXEL_STD (1, 1, 1) (its own: (0.26862954" in warning.message
    assert 'without "normalize"' in warning.message and "PIXEL_MEAN" not in warning.message


@pytest.mark.parametrize(
    ("path", "quick"),
    [
        ("models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K/snapshots/abc/open_clip_pytorch_model.bin", False),
        ("ViT-B-16_metaclip_fullcc.pt", True),
        ("openai/ViT-B-32.pt", True),
        ("my_weights/last.pt", None),
        ("laion400m_e32.pt", None),  # stands in open_clip's tables with both
    ],
)
def test_activation_by_the_name_of_the_weights(tmp_path, path, quick):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1)}, tmp_path / path)
    assert activation_of_origin(tmp_path / path)[0] is quick


def test_an_activation_against_the_origin_is_warned_of(tmp_path, caplog, monkeypatch):
    small = {
        "embed_dim": 32,
        "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {**small, "quick_gelu": name.endswith("quickgelu")})
    caplog.set_level("INFO")
    path = tmp_path / "ViT-B-32-laion2b_s34b_b79k.safetensors"
    save_file({k: v.clone() for k, v in open_clip.CLIP(**small).state_dict().items() if k != "attn_mask"}, path)
    load_clip("open_clip:ViT-B-32", path)
    assert "GELU" in caplog.text and "so that its weights" not in caplog.text
    load_clip("open_clip:ViT-B-32-quickgelu", path)
    assert (
        "takes quick-GELU but" in caplog.text
        and "laion2b_s34b_b79k, so that its weights were trained with GELU" in (caplog.text)
    )
