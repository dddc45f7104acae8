from __future__ import annotations

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainers.clip import check_backbone, load_clip, save_tiny
from trainers.clip.tiny import ASSETS, describe_arch


def test_round_trip(build_model, tiny_folder, images, prompts, used_ids):
    model = build_model("vit")
    state = {key: value.half().float() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    for weights in (tiny_folder, tiny_folder / "tiny_clip.safetensors"):
        check_backbone("tiny", weights)
        clip = load_clip("tiny", weights=weights)
        with torch.no_grad():
            torch.testing.assert_close(clip.encode_image(images), model.encode_image(images), atol=1e-5, rtol=1e-5)
            expected = model.encode_text(open_clip.tokenize(prompts))
            torch.testing.assert_close(clip.encode_text(prompts), expected, atol=1e-5, rtol=1e-5)
    stored = load_file(tiny_folder / "tiny_clip.safetensors")
    kept = sorted({*used_ids, 49406, 49407})
    assert stored["token_embedding.ids"].tolist() == kept
    assert "token_embedding.weight" not in stored
    assert {t.dtype for k, t in stored.items() if k != "token_embedding.ids"} == {torch.float16}
    table = clip.text.token_embedding.weight
    assert torch.equal(table[kept], state["token_embedding.weight"][kept])
    absent = next(i for i in range(49408) if i not in kept)
    torch.testing.assert_close(table[absent], table[kept].mean(dim=0))


def test_the_json_rebuilds_the_architecture(build_model, tiny_folder):
    data = json.loads((tiny_folder / "tiny_clip.json").read_text())
    assert data["record"] == {"seed": 0}
    rebuilt = open_clip.CLIP(**data["arch"])
    original = build_model("vit")
    assert describe_arch(rebuilt) == data["arch"]
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in original.state_dict().items()
    }


def test_loading_draws_no_random_numbers(tiny_folder):
    before = torch.get_rng_state()
    load_clip("tiny", weights=tiny_folder)
    assert torch.equal(before, torch.get_rng_state())


def test_missing_files(tmp_path, tiny_folder):
    with pytest.raises(FileNotFoundError, match=r"tiny_clip\.json to exist"):
        check_backbone("tiny", tmp_path)
    (tmp_path / "tiny_clip.json").write_bytes((tiny_folder / "tiny_clip.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"tiny_clip\.safetensors to exist"):
        load_clip("tiny", weights=tmp_path)


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"arch": {"embed_dim": 8}}'])
def test_bad_json(tmp_path, tiny_folder, text):
    (tmp_path / "tiny_clip.json").write_text(text)
    (tmp_path / "tiny_clip.safetensors").write_bytes((tiny_folder / "tiny_clip.safetensors").read_bytes())
    with pytest.raises(ValueError, match="Expected"):
        check_backbone("tiny", tmp_path)


@pytest.mark.parametrize("fault", ["no ids", "too many ids", "id beyond the vocabulary", "missing tensor"])
def test_bad_tensors(tmp_path, tiny_folder, fault):
    state = load_file(tiny_folder / "tiny_clip.safetensors")
    ids = state["token_embedding.ids"]
    if fault == "no ids":
        del state["token_embedding.ids"]
    elif fault == "too many ids":
        state["token_embedding.ids"] = torch.cat([ids, ids])
    elif fault == "id beyond the vocabulary":
        state["token_embedding.ids"] = ids + 49408
    else:
        del state["ln_final.bias"]
    save_file(state, tmp_path / "tiny_clip.safetensors")
    (tmp_path / "tiny_clip.json").write_bytes((tiny_folder / "tiny_clip.json").read_bytes())
    with pytest.raises(ValueError, match=r"ln_final\.bias" if fault == "missing tensor" else "token_embedding.ids"):
        load_clip("tiny", weights=tmp_path)


def test_save_refuses_ids_beyond_the_vocabulary(tmp_path, build_model):
    with pytest.raises(ValueError, match=r"used_ids to be in 0\.\.49407"):
        save_tiny(build_model("vit"), [50000], {}, tmp_path)


@pytest.mark.skipif(not (ASSETS / "tiny_clip.safetensors").is_file(), reason="the bundled tiny CLIP is not there yet")
def test_the_bundled_tiny_clip_loads():
    check_backbone("tiny")
    clip = load_clip("tiny")
    assert clip.image_size == 64 and clip.logit_scale >= 30
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= 10_000_000
    with torch.no_grad():
        features = clip.encode_text(["a photo of the number three.", "a photo of the number four."])
    assert features.isfinite().all() and not torch.equal(features[0], features[1])
