from __future__ import annotations

import open_clip
import pytest
import torch
from torch.nn import functional as F

from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError
from trainers.clip import (
    CLIP,
    IMAGENET_FAMILY,
    IMAGENET_TEMPLATES_SELECT,
    add_clip_config,
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


ONE, SEVEN, EIGHT = (
    ["a photo of a {}."],
    list(IMAGENET_TEMPLATES_SELECT),
    [*IMAGENET_TEMPLATES_SELECT, "a photo of a {}."],
)
SOURCES = {
    **dict.fromkeys(("DLRCLIP", "TipAdapter", "TipAdapterF", "TipAdapterPP", "TipX", "TipXPP"), SEVEN),
    **dict.fromkeys(("IMO", "IMODINO", "CrossModalProbe", "GDA", "LPPlusPlus", "ProKeR", "ProLIP", "RLA"), SEVEN),
    **dict.fromkeys(("APE", "APET", "TIMO", "AMUTuning", "DAC", "FAR"), SEVEN),
    **dict.fromkeys(("TaskRes", "CLAP"), EIGHT),
}


@pytest.mark.parametrize("name", TRAINER_REGISTRY.registered_names())
def test_the_templates_of_each_method_on_imagenet(name):
    kind = TRAINER_REGISTRY.get(name)
    for dataset in IMAGENET_FAMILY:
        assert templates_for(dataset, "", kind.imagenet_templates) == SOURCES.get(name, ONE)
        assert templates_for(dataset, "an {}", kind.imagenet_templates) == ["an {}"]
    assert templates_for("OxfordPets", "", kind.imagenet_templates) == ["a photo of a {}, a type of pet."]


TWO = ["a {}", "{} texture."]


@pytest.mark.parametrize("given", [TWO, tuple(TWO), str(TWO), f" {tuple(TWO)} "])
def test_a_list_of_templates(given, tmp_path):
    """As a value, on the command line, and in a file, whichever was there before."""
    assert templates_for("Digits", given) == TWO
    for earlier in ("", "my {}", ["my {}"]):
        cfg = get_cfg_default()
        add_clip_config(cfg)
        cfg.merge_from_list(["DATASET.TEMPLATE", earlier])
        cfg.merge_from_list(["DATASET.TEMPLATE", given])
        (tmp_path / "given.yaml").write_text(cfg.dump())
        again = get_cfg_default()
        add_clip_config(again)
        again.merge_from_file(tmp_path / "given.yaml")
        assert templates_for("Digits", cfg.DATASET.TEMPLATE) == templates_for("Digits", again.DATASET.TEMPLATE) == TWO
        cfg.merge_from_list(["DATASET.TEMPLATE", "{}"])
        assert templates_for("Digits", cfg.DATASET.TEMPLATE) == ["{}"]
    (tmp_path / "list.yaml").write_text("DATASET:\n  TEMPLATE:\n  - a {}\n  - '{} texture.'\n")
    cfg.merge_from_file(tmp_path / "list.yaml")
    assert templates_for("Digits", cfg.DATASET.TEMPLATE) == TWO
    with pytest.raises(InputError, match="DATASET.TEMPLATE to be of type"):
        cfg.merge_from_list(["DATASET.TEMPLATE", 3])


@pytest.mark.parametrize("given", [["a {}", 3], ["a {}", "b"], "['a {}', 3]", {"a": "b"}, 7])
def test_what_is_no_list_of_templates(given):
    with pytest.raises(ValueError, match=r"Expected (DATASET.TEMPLATE to be|a prompt template to contain)"):
        templates_for("Digits", given)
    assert templates_for("Digits", "[a] {}") == ["[a] {}"]  # a text that begins with a bracket
    assert templates_for("Digits", []) == ["a photo of the number {}."]


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


def test_the_mean_of_raw_features_is_another_one(build_model):
    """TaskRes, CLAP and the cross-modal probe average several templates' features with their lengths."""
    model = build_model("vit")
    names, templates = ["cat", "hot_dog", "ox"], ["a photo of a {}.", "{} texture."]
    with torch.no_grad():
        rows = [
            model.encode_text(open_clip.tokenize([t.format(n.replace("_", " ")) for t in templates])) for n in names
        ]
        expected = torch.stack([row.sum(0) / 2 / float((row.sum(0) / 2).pow(2).sum()) ** 0.5 for row in rows])
    clip = CLIP(model)
    torch.testing.assert_close(zeroshot_weights(clip, names, templates, True), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(zeroshot_weights(clip, names, templates), expected, atol=1e-4)
    one = templates[:1]
    assert torch.equal(zeroshot_weights(clip, names, one, True), zeroshot_weights(clip, names, one))


def test_zeroshot_weights_of_a_half_precision_clip_are_fp32(build_model):
    weights = zeroshot_weights(CLIP(build_model("vit"), precision="bf16"), ["cat", "dog"], ["a {}"])
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(2))


def test_zeroshot_weights_need_classes_and_templates(build_model):
    with pytest.raises(ValueError, match="but got 0 and 1"):
        zeroshot_weights(CLIP(build_model("vit")), [], ["a {}"])
