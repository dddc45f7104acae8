import open_clip
import pytest
import torch
from torch.nn import functional as F

from trainers.base.feature_learner import FeatureNetwork
from trainers.clip import IMAGENET_TEMPLATES, IMAGENET_TEMPLATES_SELECT, zeroshot_weights
from trainers.clip.templates import ensemble_templates
from trainers.features.encoder import ImageEncoder
from trainers.zsclip import EnsembleLearner

OWN = "a centered satellite photo of {}."


def test_eighty_templates_of_which_seven_are_selected():
    assert len(set(IMAGENET_TEMPLATES)) == len(IMAGENET_TEMPLATES) == 80
    assert set(IMAGENET_TEMPLATES_SELECT) < set(IMAGENET_TEMPLATES)
    assert all(template.count("{}") == 1 and template.endswith(".") for template in IMAGENET_TEMPLATES)
    assert (IMAGENET_TEMPLATES[0], IMAGENET_TEMPLATES[-1]) == ("a bad photo of a {}.", "a tattoo of the {}.")


def test_ensemble_adds_the_dataset_s_own_template_each_time_anew():
    for _ in range(2):  # nothing is appended to a shared list
        assert ensemble_templates([OWN], "select", "EuroSAT") == [*IMAGENET_TEMPLATES_SELECT, OWN]
    assert ensemble_templates([OWN], "all", "EuroSAT") == [*IMAGENET_TEMPLATES, OWN]
    assert ensemble_templates(["a photo of a {}."], "select", "ImageNet") == list(IMAGENET_TEMPLATES_SELECT)
    assert len(ensemble_templates(["a photo of a {}."], "select", "ImageNetV2")) == 8
    assert len(ensemble_templates(["a photo of a {}."], "all", "ImageNetV2")) == 80


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@torch.no_grad()
def test_logits_against_open_clip(kind, make_clip, images, names):
    from random_clip import random_open_clip

    model, clip = random_open_clip(kind), make_clip(kind)
    templates = ensemble_templates([OWN], "select", "EuroSAT")
    weights = zeroshot_weights(clip, names, templates)
    learner = EnsembleLearner(clip, names, zeroshot_weights(clip, names, [OWN]), weights)
    clip_logits, logits = FeatureNetwork(ImageEncoder(clip, "fp32", torch.no_grad), learner).both(images)
    features = F.normalize(model.encode_image(images), dim=1)

    def naive(templates):
        columns = []
        for name in names:
            prompts = [template.format(name.replace("_", " ")) for template in templates]
            each = F.normalize(model.encode_text(open_clip.tokenize(prompts)), dim=1)
            columns.append(F.normalize(each.mean(0), dim=0))
        return 100 * features @ torch.stack(columns).t()

    torch.testing.assert_close(logits, naive(templates), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(clip_logits, naive([OWN]), rtol=1e-4, atol=1e-3)
