import json
import math

import pytest
import torch
from random_clip import random_open_clip
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from trainers.clip import CLIP
from trainers.features.corrected import check_adapters, load_adapters, read_recipe, save_adapters
from trainers.modules.overlap_adapters import IMOAdapters


def trained(clip, dim=5, seed=3, **arguments):
    """Adapters that change something."""
    torch.manual_seed(seed)
    adapters = IMOAdapters(clip.visual.widths, dim, **arguments)
    for p in adapters.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return adapters


def naive_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("form", ["beside", "after"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@torch.no_grad()
def test_encoding_equals_hooks_on_open_clip_s_blocks(make_clip, images, kind, form):
    """beside: s up(relu(down(x'))), x' what enters ln_2 (a ResNet: a block's output); after: up(gelu(down(output)))."""
    clip, model = make_clip(kind), random_open_clip(kind)
    adapters = trained(clip, form=form, scale=0.3)
    visual = model.visual
    stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4) if kind == "resnet" else ()
    blocks = [block for stage in stages for block in stage] or list(visual.transformer.resblocks)
    state = adapters.state_dict()

    def hook(i):
        down, down_bias, up, up_bias = (
            state[f"blocks.{i}.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")
        )

        def after(_, seen, out):
            tokens = out.movedim(1, -1) if out.ndim == 4 else out
            entering = streams.get(i, tokens)
            inner = entering @ down.t() + down_bias
            if form == "beside":
                tokens = tokens + 0.3 * (inner.clamp(min=0) @ up.t() + up_bias)
            else:
                tokens = tokens + naive_gelu(inner) @ up.t() + up_bias
            return tokens.movedim(-1, 1) if out.ndim == 4 else tokens

        return after

    streams = {}
    for i, block in enumerate(blocks, start=1):
        block.register_forward_hook(hook(i))
        if kind == "vit" and form == "beside":
            block.ln_2.register_forward_pre_hook(lambda _, seen, i=i: streams.__setitem__(i, seen[0]))
    want = visual(images)
    torch.testing.assert_close(adapters.encode(clip, images, unit=False), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapters.encode(clip, images), F.normalize(want, dim=-1), rtol=1e-4, atol=1e-5)


def test_dropout_follows_seed_and_place_in_the_whole_batch(make_clip, images):
    clip = make_clip()
    adapters = trained(clip, dropout=0.4)
    still = adapters.eval().encode(clip, images)
    whole = torch.ones(600, 5)
    adapters.dropout.seed(7, torch.device("cpu"), 0, 1)
    kept = adapters.dropout(whole)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.6))}
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
    for rank in range(2):  # the images of two processes
        adapters.dropout.seed(7, torch.device("cpu"), rank, 2)
        assert torch.equal(adapters.dropout(whole[rank::2]), kept[rank::2])
    adapters.dropout.seed(7, torch.device("cpu"), 0, 1)
    drops = adapters.train().encode(clip, images)
    assert not torch.allclose(drops, still)
    adapters.dropout.seed(7, torch.device("cpu"), 0, 1)
    assert torch.equal(adapters.encode(clip, images), drops)
    assert torch.equal(adapters.eval().encode(clip, images), still)


@torch.no_grad()
def test_files_of_earlier_versions_load_in_the_form_they_were_made_with(make_clip, images, tmp_path):
    """They say neither form nor scale, and had up(gelu(down(h))) after the block."""
    clip, file = make_clip(), tmp_path / "old.safetensors"
    adapters = trained(clip, form="after")
    save_adapters(file, adapters, clip, {"trainer": "IMO"})
    with safe_open(str(file), framework="pt") as opened:
        state, recipe = {key: opened.get_tensor(key) for key in opened.keys()}, read_recipe(file)  # noqa: SIM118
    for name in ("form", "scale"):
        del recipe[name]
    save_file(state, file, metadata={"recipe": json.dumps({**recipe, "format": "imo-adapters-1"})})
    again = load_adapters(file, clip)
    assert again.made_as == {"form": "after", "scale": 1.0} and again.digest() == recipe["digest"]
    assert torch.equal(again.encode(clip, images), adapters.encode(clip, images))


@torch.no_grad()
def test_a_file_keeps_the_form_and_the_scale(make_clip, images, tmp_path):
    clip = make_clip()
    adapters = trained(clip, scale=0.1)
    save_adapters(tmp_path / "a", adapters, clip, {})
    again = load_adapters(tmp_path / "a", clip)
    assert again.made_as == {"form": "beside", "scale": 0.1} and again.digest() == adapters.digest()
    assert torch.equal(again.encode(clip, images), adapters.encode(clip, images))
    assert len({trained(clip, **how).digest() for how in ({}, {"scale": 0.1}, {"form": "after"})}) == 3
    with pytest.raises(ValueError, match="Expected adapters of the form beside or after"):
        again.take_form({"form": "within"})


@torch.no_grad()
def test_fresh_adapters_change_nothing(make_clip, images):
    clip = make_clip()
    adapters = IMOAdapters(clip.visual.widths, 64)
    assert torch.equal(adapters.encode(clip, images), F.normalize(clip.encode_image(images), dim=-1))
    assert not any(block.down.bias.any() for block in adapters.blocks.values())
    assert {i: (p.down.out_features, p.up.out_features) for i, p in adapters.blocks.items()} == {
        str(i): (64, 48) for i in range(1, 5)
    }


def test_file_keeps_weights_and_recipe(make_clip, images, tmp_path):
    clip = make_clip()
    adapters = trained(clip)
    save_adapters(tmp_path / "run" / "imo_adapters.safetensors", adapters, clip, {"trainer": "IMO", "data": "X"})
    for path in (tmp_path / "run", tmp_path / "run" / "imo_adapters.safetensors"):
        again = load_adapters(path, clip)
        assert torch.equal(again.encode(clip, images), adapters.encode(clip, images).detach())
        assert not any(p.requires_grad for p in again.parameters())
        assert again.digest() == adapters.digest()
    recipe = read_recipe(tmp_path / "run")
    assert recipe["trainer"] == "IMO" and recipe["weights_digest"] == clip.weights_digest and recipe["dim"] == 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["imo_adapters.safetensors"]


def test_other_backbones_are_refused(make_clip, tmp_path):
    clip = make_clip()
    file = tmp_path / "a.safetensors"
    save_adapters(file, trained(clip), clip, {})
    with pytest.raises(ValueError, match=r"Expected adapters .* for blocks of widths \{1: 48, .*5: 48\} but .* 4: 48"):
        load_adapters(file, make_clip(vision_layers=5))
    with pytest.raises(ValueError, match="with weights of sha256"):
        load_adapters(file, CLIP(random_open_clip("vit", seed=1), name="random-vit"))
    with pytest.raises(ValueError, match="for backbone ViT-B/16 but got some for random-vit"):
        check_adapters(file, "ViT-B/16")
    check_adapters(file, "random-vit")


def test_what_is_no_file_of_adapters_is_refused(make_clip, tmp_path):
    clip = make_clip()
    with pytest.raises(FileNotFoundError, match="Expected MODEL.IMO_WEIGHTS to be a file"):
        load_adapters(tmp_path, clip)
    (tmp_path / "text").write_text("adapters")
    with pytest.raises(ValueError, match="Expected .*text to be a safetensors file"):
        read_recipe(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="tensors without a recipe"):
        read_recipe(tmp_path / "other")


def test_changed_tensors_are_noticed(make_clip, tmp_path):
    clip, file = make_clip(), tmp_path / "a"
    save_adapters(file, trained(clip), clip, {})
    with safe_open(str(file), framework="pt") as opened:
        state, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    state["blocks.1.up.bias"] += 1
    save_file(state, file, metadata=metadata)
    with pytest.raises(ValueError, match="but they differ"):
        load_adapters(file, clip)
    assert json.loads(metadata["recipe"])["format"] == "imo-adapters-2"


def test_nothing_to_adapt_is_refused():
    for widths, dim in (({}, 4), ({1: 8}, 0)):
        with pytest.raises(ValueError, match="Expected blocks to adapt"):
            IMOAdapters(widths, dim)
