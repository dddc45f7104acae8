"""Backbones without blocks: features are those of open_clip's own model, tokenizer and transform."""

from __future__ import annotations

import logging
import socket

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from random_towers import KINDS, known_towers
from safetensors.torch import load_file, save_file

from dassl.config import get_cfg_default
from dassl.data.transforms import build_transform
from trainers.clip import check_backbone, complete_input, is_resnet, load_clip, preprocessing_of, why_no_blocks
from trainers.clip.backbones import resolve_backbone
from trainers.clip.edits import BlockEdit
from trainers.clip.sources import HubSource

pytest.importorskip("transformers", reason="pip install transformers")
PROMPTS = ["a photo of the number zero.", "A photo of the RED circle!", "circle"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    with known_towers(tmp_path_factory.mktemp("towers")) as files:
        yield files


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (4 + i, 7, 3), dtype=np.uint8) for i in range(3)]
    return [Image.fromarray(one).resize((300, 180 + 40 * i), Image.Resampling.BICUBIC) for i, one in enumerate(coarse)]


def input_of(name):
    """The configuration of a run that leaves all of INPUT to the backbone."""
    cfg = get_cfg_default()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS = name, ""
    complete_input(cfg, ())
    return cfg


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_open_clip(kind, towers, photos):
    name = f"open_clip:{kind}"
    check_backbone(name, towers[kind])
    clip = load_clip(name, towers[kind])
    theirs, _, transform = open_clip.create_model_and_transforms(
        kind, pretrained=str(towers[kind]), pretrained_text=False
    )
    theirs.eval()
    ids = open_clip.get_tokenizer(kind)(PROMPTS)
    ours = build_transform(input_of(name), is_train=False)
    images = torch.stack([ours(photo) for photo in photos])
    want = theirs.encode_image(torch.stack([transform(photo) for photo in photos]), normalize=False)
    got = clip.encode_image(images)
    assert float((got - want).abs().max()) < 1e-5 and float((want[0] - want[1]).abs().max()) > 1e-3
    want = theirs.encode_text(ids, normalize=False)
    got = clip.encode_text(PROMPTS)
    assert float((got - want).abs().max()) < 1e-5 and float((want[0] - want[1]).abs().max()) > 1e-3
    assert got.shape == (3, clip.embed_dim)
    assert clip.logit_scale == pytest.approx(float(theirs.logit_scale.exp()), rel=1e-6)
    assert clip.logit_bias == (-10.0 if kind == "small-siglip" else 0.0)
    assert not clip.has_blocks and not any(p.requires_grad for p in clip.parameters()) and not clip.training


@pytest.mark.parametrize("kind", ["small-siglip", "small-coca"])
@torch.no_grad()
def test_half_precision_is_near(kind, towers):
    images = torch.rand(2, 3, *preprocessing_of(f"open_clip:{kind}").SIZE)
    full, half = (load_clip(f"open_clip:{kind}", towers[kind], precision) for precision in ("fp32", "bf16"))
    assert half.encode_image(images).dtype == torch.bfloat16
    for one, other in (
        (full.encode_image(images), half.encode_image(images)),
        (full.encode_text(PROMPTS), half.encode_text(PROMPTS)),
    ):
        assert torch.cosine_similarity(one, other.float()).min() > 0.995
    assert full.weights_digest == half.weights_digest


def test_loading_draws_nothing_and_leaves_the_root_logger_alone(towers):
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        torch.manual_seed(3)
        want = torch.rand(1)
        torch.manual_seed(3)
        load_clip("open_clip:small-siglip", towers["small-siglip"])
        assert torch.equal(torch.rand(1), want) and root.handlers == []
    finally:
        root.handlers = handlers


def test_a_text_encoder_beside_its_module_or_in_it(towers, tmp_path):
    """open_clip saves a plain text encoder's tensors beside the image encoder's; other files have them apart."""
    state = load_file(towers["small-convnext"])
    apart = {name if name.startswith(("visual.", "logit")) else f"text.{name}": v for name, v in state.items()}
    save_file(apart, tmp_path / "apart.safetensors")
    first = load_clip("open_clip:small-convnext", towers["small-convnext"])
    assert load_clip("open_clip:small-convnext", tmp_path / "apart.safetensors").weights_digest == first.weights_digest


def test_other_weights_are_refused(towers, tmp_path):
    with pytest.raises(ValueError, match="Expected the weights of open_clip:small-siglip in .* but got tensors .*miss"):
        load_clip("open_clip:small-siglip", towers["small-coca"])
    state = load_file(towers["small-siglip"])
    del state["logit_bias"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(logit_bias\)"):
        load_clip("open_clip:small-siglip", tmp_path / "x.safetensors")


def test_prompts_that_are_cut_are_told(towers, caplog):
    clip = load_clip("open_clip:small-siglip", towers["small-siglip"])
    room = clip.text.context_length - 1  # the last token says that the text ends
    clip.encode_text([" ".join(["red"] * room)])
    assert "are cut" not in caplog.text
    clip.encode_text(["red", " ".join(["red"] * (room + 1))])
    assert "1 prompts of more than 16 tokens are cut, such as 'red red" in caplog.text


@pytest.mark.parametrize("prompts", ["a photo", []])
def test_prompts_are_a_list(prompts, towers):
    with pytest.raises(ValueError, match="non-empty list of strings"):
        load_clip("open_clip:small-siglip", towers["small-siglip"]).encode_text(prompts)


def test_what_needs_blocks_is_refused(towers):
    clip = load_clip("open_clip:small-siglip", towers["small-siglip"])
    images = torch.rand(1, 3, 160, 160)
    for ask in (
        lambda: clip.pool_image(images),
        lambda: clip.visual.projection(),
        lambda: clip.visual.prefix(images, 1, [BlockEdit()]),
        lambda: clip.text.tokenise(["red"]),
        lambda: clip.visual.first_tokens(images, 1, [], 1),
    ):
        with pytest.raises(ValueError, match="Expected a"):
            ask()
    with pytest.raises(ValueError, match="Expected images to have shape"):
        clip.encode_image(torch.rand(1, 3, 64, 64))


# Names


def test_every_model_of_open_clip_resolves_and_says_what_it_wants_of_images():
    for model in open_clip.list_models():
        name, arch = f"open_clip:{model}", open_clip.get_model_config(model)
        size = arch["vision_cfg"]["image_size"]
        assert preprocessing_of(name).SIZE == (size, size)
        assert bool(why_no_blocks(name)) is not resolve_backbone(name).has_blocks
        is_resnet(name)
    assert why_no_blocks("open_clip:ViT-B-16-SigLIP").startswith("'open_clip:ViT-B-16-SigLIP' has custom_text, init_")
    for model, tag in open_clip.list_pretrained():
        assert resolve_backbone(f"open_clip:{model}/{tag}").sources
    assert resolve_backbone("open_clip:ViTamin-S/datacomp1b").sources == (
        HubSource("jienengchen/ViTamin-S", ("pytorch_model.bin",)),
    )


@pytest.mark.parametrize(
    "name", ["ViT-B-32-quickgelu/metaclip_400m", "ViT-H-14-quickgelu/metaclip_fullcc", "ViT-B-32/laion2b_s34b_b79k"]
)
def test_plain_clips_keep_their_blocks(name):
    backbone = resolve_backbone(f"open_clip:{name}")
    assert backbone.has_blocks and backbone.arch["quick_gelu"] is ("quickgelu" in name)


@pytest.mark.parametrize("tag", ["", "/webli"])
def test_preprocessing_is_that_of_the_tag_or_of_all_tags(tag):
    own = preprocessing_of(f"open_clip:ViT-B-16-SigLIP{tag}")
    assert own.PIXEL_MEAN == own.PIXEL_STD == (0.5, 0.5, 0.5) and own.SQUASH and own.INTERPOLATION == "bicubic"
    assert not preprocessing_of("open_clip:ViT-B-32/openai").SQUASH
    plain = next(
        f"open_clip:{model}/{name}"
        for model, name in open_clip.list_pretrained()
        if resolve_backbone(f"open_clip:{model}/{name}").has_blocks
        and open_clip.get_pretrained_cfg(model, name)["resize_mode"] == "squash"
    )
    assert not preprocessing_of(plain).SQUASH  # as before


@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2"])
def test_squashed_images_are_those_of_open_clip(model, photos):
    cfg = input_of(f"open_clip:{model}/webli")
    stated = open_clip.get_pretrained_cfg(model, "webli")
    theirs = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(
            size=224, **{key: stated[key] for key in ("mean", "std", "interpolation", "resize_mode")}
        ),
        is_train=False,
    )
    ours = build_transform(cfg, is_train=False)
    for photo in photos:
        assert float((ours(photo) - theirs(photo)).abs().max()) < 1e-5


# What is needed beside the weights


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-B-16-SigLIP", r"Expected the tokenizer of .* hf download timm/ViT-B-16-SigLIP tokenizer.json"),
        ("ViT-L-14-CLIPA", "hf download bert-base-uncased tokenizer.json"),
        ("roberta-ViT-B-32", "Expected the tokenizer of .* hf download roberta-base"),
        ("nllb-clip-base", "hf download facebook/nllb-200-distilled-600M"),
    ],
)
def test_without_tokenizer_and_network_the_error_says_what_to_fetch(model, message, nowhere, towers):
    for ask in (check_backbone, load_clip):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            ask(f"open_clip:{model}", towers["small-siglip"])
        assert "\n" not in str(caught.value)


def test_without_transformers_the_error_says_so(monkeypatch, towers):
    find = open_clip.__spec__  # something that is there
    monkeypatch.setattr(
        "trainers.clip.opaque.importlib.util.find_spec", lambda name: None if name == "transformers" else find
    )
    with pytest.raises(ValueError, match="Expected the package transformers, which the tokenizer and the config.*of"):
        check_backbone("open_clip:small-roberta", towers["small-roberta"])
    check_backbone("open_clip:small-eva", towers["small-eva"])


def test_a_tokenizer_that_does_not_load(monkeypatch, towers):
    def broken(*args, **kwargs):
        raise OSError("no such vocabulary\nand more")

    monkeypatch.setattr(open_clip, "get_tokenizer", broken)
    with pytest.raises(ValueError, match="open_clip's small-siglip to load but got OSError: no such vocabulary$"):
        load_clip("open_clip:small-siglip", towers["small-siglip"])


def test_nothing_is_fetched(towers, monkeypatch):
    """Not even where a model's configuration asks for pretrained towers."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for kind in ("small-siglip", "small-roberta"):
        load_clip(f"open_clip:{kind}", towers[kind])


def test_images_have_to_be_square():
    from trainers.clip.opaque import OpaqueVision

    arch = {"embed_dim": 8, "vision_cfg": {"image_size": [32, 64]}}
    with pytest.raises(ValueError, match="square images but got 32 x 64 pixels"):
        OpaqueVision(torch.nn.Linear(1, 1), arch, None)
