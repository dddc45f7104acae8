"""Weights that Hugging Face's CLIPModel has written, against that model itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from trainers.clip import check_backbone, load_clip
from trainers.clip.hugging_face import as_open_clip

PROMPTS = ["a photo of a cat.", "a photo of a hot air balloon."]


@pytest.fixture(scope="module")
def model():
    """A CLIPModel of ViT-B/32's size with random weights that have no symmetry."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig()  # its defaults are ViT-B/32's
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 12
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
        for p in model.parameters():
            p.data += 0.02 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging_face")
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_features_are_those_of_the_model(model, folder):
    check_backbone("ViT-B/32", folder)
    clip = load_clip("ViT-B/32", folder)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    vision = model.vision_model(pixel_values=images).pooler_output
    theirs = model.visual_projection(vision)
    torch.testing.assert_close(clip.encode_image(images), theirs, rtol=1e-4, atol=1e-4)
    ids = open_clip.get_tokenizer("ViT-B-32")(PROMPTS)
    hidden = model.text_model(input_ids=ids).last_hidden_state
    theirs = model.text_projection(hidden[torch.arange(len(ids)), ids.argmax(dim=1)])
    ours = F.normalize(clip.encode_text(PROMPTS), dim=-1)
    torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), rtol=1e-4, atol=1e-4)
    assert float(clip.logit_scale) == pytest.approx(float(model.logit_scale.exp()))


def test_the_file_alone_and_torch_s_form_are_read(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    digests = {load_clip("ViT-B/32", path).weights_digest for path in (folder, folder / "model.safetensors", tmp_path)}
    assert len(digests) == 1


def test_other_folders_and_other_sizes_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"Expected the weights of ViT-B/16 .* but got tensors"):
        load_clip("ViT-B/16", folder)
    with pytest.raises(FileNotFoundError, match="model.safetensors or pytorch_model.bin"):
        check_backbone("ViT-B/32", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="got a model of type 'siglip'"):
        check_backbone("ViT-B/32", tmp_path)


def test_another_activation_is_told(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "gelu")
    config = Path(tmp_path / "gelu" / "config.json")
    values = json.loads(config.read_text())
    values["vision_config"]["hidden_act"] = "gelu"
    config.write_text(json.dumps(values))
    load_clip("ViT-B/32", tmp_path / "gelu")
    assert "takes quick-GELU but the configuration beside" in caplog.text
    caplog.clear()
    load_clip("ViT-B/32", folder)
    assert "takes quick-GELU but" not in caplog.text


def test_a_matrix_without_its_two_others_is_named(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    del state["text_model.encoder.layers.3.self_attn.k_proj.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"missing .*resblocks.3.attn.in_proj_weight"):
        load_clip("ViT-B/32", tmp_path / "weights.safetensors")
    assert "transformer.resblocks.3.attn.in_proj_weight.q" in as_open_clip(state)
