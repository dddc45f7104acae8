"""Sentences of the classes' own in place of templates."""

import json

import pytest
import torch
from torch.nn import functional as F

from trainers.clip import Prompts, mean_text_features, read_descriptions, sentences_of, zeroshot_weights
from trainers.clip.templates import ensemble_templates

TEXTS = {"sea lake": ["water.", "a photo of a lake."], "Forest": ["many trees in a photo."]}


def test_weights_are_the_means_of_each_class(make_clip):
    clip, prompts = make_clip(), Prompts(["a {}."], TEXTS)
    raw = [torch.stack([clip.encode_text([text])[0] for text in texts]) for texts in TEXTS.values()]
    want = torch.stack([F.normalize(F.normalize(rows, dim=-1).mean(0), dim=0) for rows in raw])
    torch.testing.assert_close(zeroshot_weights(clip, ["sea_lake", "forest"], prompts), want)
    torch.testing.assert_close(mean_text_features(clip, list(TEXTS), prompts), torch.stack([r.mean(0) for r in raw]))
    means = F.normalize(torch.stack([r.mean(0) for r in raw]), dim=-1)
    torch.testing.assert_close(zeroshot_weights(clip, list(TEXTS), prompts, raw_mean=True), means)
    plain = zeroshot_weights(clip, list(TEXTS), ["a {}."])
    assert torch.equal(zeroshot_weights(clip, list(TEXTS), Prompts(["a {}."])), plain)


def test_classes_are_found_by_name():
    prompts = Prompts([], {**TEXTS, "sea_lake": ["exactly this."]}, "own.json")
    assert sentences_of(prompts, ["sea_lake", "SEA  lake", "forest"]) == [
        ["exactly this."],
        TEXTS["sea lake"],
        TEXTS["Forest"],
    ]
    with pytest.raises(
        ValueError, match=r"own.json to describe every class but it lacks 'forrest' \(it has \"Forest\"\)"
    ):
        sentences_of(prompts, ["sea lake", "forrest"])
    with pytest.raises(ValueError, match="'1', '2', '3' and 2 more"):
        sentences_of(prompts, [str(i) for i in range(1, 6)])
    assert sentences_of(["a {}."], ["x"]) == sentences_of(Prompts(["a {}."]), ["x"]) == []


def test_an_ensemble_of_templates_gives_way():
    prompts = Prompts(["a {}."], TEXTS)
    assert ensemble_templates(prompts, "select", "Digits") is prompts
    assert len(ensemble_templates(Prompts(["a {}."]), "select", "Digits")) == 8
    assert str(Prompts(["a {}.", "the {}."])) == "a {}. | the {}."
    assert str(Prompts([], TEXTS, "x.json")) == "the sentences of x.json"


def test_the_file_is_read(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(TEXTS), encoding="utf-8")
    assert read_descriptions(str(path)) == TEXTS
    with pytest.raises(FileNotFoundError, match="DATASET.DESCRIPTIONS to be a JSON file"):
        read_descriptions(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "but got"),
        ("[]", "but got list"),
        ("{}", "but got nothing"),
        ('{"a": []}', "'a' has"),
        ('{"a": "b"}', "'a' has"),
        ('{"a": ["b", " "]}', "no empty one"),
        ('{"a": ["b", 3]}', "'a' has"),
        ('{"a": ["b"], "a": ["c"]}', "'a' stands there twice"),
    ],
)
def test_what_is_no_such_file(tmp_path, text, message):
    (tmp_path / "texts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_descriptions(str(tmp_path / "texts.json"))
