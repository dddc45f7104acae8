from __future__ import annotations

import open_clip
import pytest
import torch
from torch.nn import functional as F

from trainers.clip import (
    CLIP,
    IMAGENET_TEMPLATES_SELECT,
    clean_classname,
    templates_for,
    zeroshot_weights,
)


def test_templates():
    assert templates_for("OxfordPets") == ["a photo of a {}, a type of pet."]
    assert templates_for("DescribableTextures") == ["{} texture."]
    assert templates_for("Digits") == ["a photo of the number {}."]
    for name in ("ImageNetA", "ShapesSketch", "MyOwnData"):
        assert templates_for(name) == ["a photo of a {}."]
    assert templates_for("OxfordPets", "my {}") == ["my {}"]
    assert len(IMAGENET_TEMPLATES_SELECT) == len(set(IMAGENET_TEMPLATES_SELECT)) == 7


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {name}", "{0}", "{{}}"])
def test_a_template_has_one_slot(template):
    with pytest.raises(ValueError, match="exactly once but got"):
        templates_for("Digits", template)


def test_clean_classname_changes_underscores_only():
    assert clean_classname("2012_Ram C/V-Van") == "2012 Ram C/V-Van"


def test_zeroshot_weights_equal_a_plain_loop(build_model, monkeypatch):
    model = build_model("vit")
    names, templates = ["cat", "hot_dog", "ox"], ["a photo of a {}.", "{} texture."]
    expected = []
    with torch.no_grad():
        for name in names:
            ids = open_clip.tokenize([t.format(name.replace("_", " ")) for t in templates])
            expected.append(F.normalize(F.normalize(model.encode_text(ids), dim=-1).mean(dim=0), dim=0))
    clip = CLIP(model)
    weights = zeroshot_weights(clip, names, templates)
    torch.testing.assert_close(weights, torch.stack(expected), atol=1e-5, rtol=0)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    monkeypatch.setattr("trainers.clip.templates._CHUNK", 2)
    torch.testing.assert_close(zeroshot_weights(clip, names, templates), weights, atol=1e-5, rtol=0)


def test_zeroshot_weights_of_a_half_precision_clip_are_fp32(build_model):
    weights = zeroshot_weights(CLIP(build_model("vit"), precision="bf16"), ["cat", "dog"], ["a {}"])
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(2))


def test_zeroshot_weights_need_classes_and_templates(build_model):
    with pytest.raises(ValueError, match="but got 0 and 1"):
        zeroshot_weights(CLIP(build_model("vit")), [], ["a {}"])
