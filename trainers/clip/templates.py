"""Prompt templates per dataset and zero-shot weights.

The templates are those of the few-shot CLIP literature (CoOp's zero-shot CLIP; Tip-Adapter uses the same strings). On
ImageNet and its shifted test sets methods differ; each trainer says which templates it takes (`imagenet_templates`).
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from .descriptions import Prompts, sentences_of
from .model import CLIP

DEFAULT_TEMPLATE = "a photo of a {}."

TEMPLATES: dict[str, str] = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "StanfordCars": DEFAULT_TEMPLATE,
    "Food101": "a photo of {}, a type of food.",
    "SUN397": DEFAULT_TEMPLATE,
    "Caltech101": DEFAULT_TEMPLATE,
    "UCF101": "a photo of a person doing {}.",
    "ImageNet": DEFAULT_TEMPLATE,
    "ImageNetSketch": DEFAULT_TEMPLATE,
    "ImageNetV2": DEFAULT_TEMPLATE,
    "ImageNetA": DEFAULT_TEMPLATE,
    "ImageNetR": DEFAULT_TEMPLATE,
    "Digits": "a photo of the number {}.",
    "Shapes": DEFAULT_TEMPLATE,
    "ShapesV2": DEFAULT_TEMPLATE,
    "ShapesSketch": DEFAULT_TEMPLATE,
    "ShapesA": DEFAULT_TEMPLATE,
    "ShapesR": DEFAULT_TEMPLATE,
    "DigitsNonsense": DEFAULT_TEMPLATE,
    "ShapesNonsense": DEFAULT_TEMPLATE,
}

# The seven of OpenAI's eighty ImageNet templates that were selected for ensembling.
IMAGENET_TEMPLATES_SELECT: tuple[str, ...] = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

# These seven and the default template, as TaskRes and CLAP take them.
IMAGENET_TEMPLATES_SELECT_OWN: tuple[str, ...] = (*IMAGENET_TEMPLATES_SELECT, DEFAULT_TEMPLATE)

# All eighty of OpenAI's ImageNet templates.
IMAGENET_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)

IMAGENET_FAMILY = ("ImageNet", "ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR")

_CHUNK = 512  # prompts encoded at once: bounds memory at thousands of classes


def clean_classname(name: str) -> str:
    """Return a class name as it appears in a prompt: underscores become spaces, nothing else changes."""
    return name.replace("_", " ")


def fill_template(template: str, classname: str) -> str:
    """Return the template's prompt for one class.

    Raises:
        ValueError: the template does not have exactly one ``{}``, or has other braces.
    """
    if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
        raise ValueError(f"Expected a prompt template to contain {{}} exactly once but got {template!r}")
    return template.replace("{}", clean_classname(classname))


def parse_templates(value: Any) -> list[str]:
    """Return the templates that DATASET.TEMPLATE gives: a text, a list of texts, or such a list written as a text.

    An empty text gives an empty list.

    Raises:
        ValueError: the value is anything else, or a template does not have exactly one ``{}``.
    """
    given = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "("):
        try:
            given = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            given = value  # a template that begins with a bracket
    templates = [given] if isinstance(given, str) else given
    if not isinstance(templates, (list, tuple)) or not all(isinstance(template, str) for template in templates):
        raise ValueError(f"Expected DATASET.TEMPLATE to be a prompt template or a list of them but got {value!r}")
    if list(templates) == [""]:
        return []
    for template in templates:
        fill_template(template, "")
    return list(templates)


def templates_for(dataset_name: str, override: Any = "", imagenet: Sequence[str] = (DEFAULT_TEMPLATE,)) -> list[str]:
    """Return the zero-shot templates of a dataset.

    Args:
        dataset_name: the dataset's registry name; an unknown one gets the general template.
        override: DATASET.TEMPLATE; used instead if not empty (see `parse_templates`).
        imagenet: the templates that a method takes on ImageNet and its shifted test sets.
    """
    own = imagenet if dataset_name in IMAGENET_FAMILY else [TEMPLATES.get(dataset_name, DEFAULT_TEMPLATE)]
    return parse_templates(override) or list(own)


@torch.no_grad()
def zeroshot_weights(clip: CLIP, classnames: Sequence[str], templates: Sequence[str], raw_mean: bool = False) -> Tensor:
    """Build the zero-shot classifier: normalize each prompt's features, average over templates, normalize again.

    Args:
        classnames: C names as the dataset spells them.
        templates: at least one template with one ``{}`` each; or Prompts, whose sentences then count, if it has any.
        raw_mean: average the features of several prompts as CLIP gives them, without normalizing them first.

    Returns:
        fp32 weights [C, E] with unit rows, on CLIP's device.

    Raises:
        ValueError: there are no classes or no templates, or a class has no sentences.
    """
    if not classnames or not templates:
        raise ValueError(f"Expected at least one class and one template but got {len(classnames)} and {len(templates)}")
    described = sentences_of(templates, classnames)
    if raw_mean and (described or len(templates) > 1):
        return F.normalize(mean_text_features(clip, classnames, templates), dim=-1)
    if described:
        features, _ = sentence_features(clip, described)
        return F.normalize(_class_means(F.normalize(features, dim=-1), described), dim=-1)
    total = torch.zeros(len(classnames), clip.embed_dim, device=clip.device)
    for template in templates:  # one template at a time: its leading words are then shared by all prompts
        prompts = [fill_template(template, name) for name in classnames]
        chunks = [prompts[i : i + _CHUNK] for i in range(0, len(prompts), _CHUNK)]
        total += torch.cat([F.normalize(clip.encode_text(chunk).float(), dim=-1) for chunk in chunks])
    return F.normalize(total / len(templates), dim=-1)


@torch.no_grad()
def mean_text_features(clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the mean over the templates, or over its own sentences, of each class's text features, fp32 [C, E].

    Features are taken as CLIP gives them. Neither they nor the mean are normalized.
    """
    described = sentences_of(templates, classnames)
    if described:
        return _class_means(sentence_features(clip, described)[0], described)
    total = torch.zeros(len(classnames), clip.embed_dim, device=clip.device)
    for template in templates:
        prompts = [fill_template(template, name) for name in classnames]
        chunks = [prompts[i : i + _CHUNK] for i in range(0, len(prompts), _CHUNK)]
        total += torch.cat([clip.encode_text(chunk).float() for chunk in chunks])
    return total / len(templates)


@torch.no_grad()
def sentence_features(clip: CLIP, described: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Return the features [M, E] of all sentences as CLIP gives them, fp32, and the class [M] of each.

    Args:
        described: the sentences of each class.
    """
    sentences = [text for texts in described for text in texts]
    chunks = [sentences[i : i + _CHUNK] for i in range(0, len(sentences), _CHUNK)]
    features = torch.cat([clip.encode_text(chunk).float() for chunk in chunks])
    counts = torch.tensor([len(texts) for texts in described])
    return features, torch.arange(len(described)).repeat_interleave(counts).to(features.device)


def prompt_features(clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the features [M, E] of every single prompt, normalized, and the class [M] of each.

    The prompts are the classes' own sentences, where there are such, else each template with each class name.
    """
    described = sentences_of(templates, classnames)
    if described:
        features, labels = sentence_features(clip, described)
        return F.normalize(features, dim=-1), labels
    features = torch.stack([zeroshot_weights(clip, classnames, [template]) for template in templates])
    return features.flatten(0, 1), torch.arange(len(classnames), device=features.device).repeat(len(templates))


def _class_means(features: Tensor, described: Sequence[Sequence[str]]) -> Tensor:
    return torch.stack([rows.mean(dim=0) for rows in features.split([len(texts) for texts in described])])


def ensemble_templates(own: Sequence[str], which: str, dataset: str) -> list[str]:
    """Return the templates of the ensemble: ImageNet's, and for any other dataset also its own.

    A template of the dataset that is already among ImageNet's is not repeated. Sentences of the classes stay alone.

    Args:
        own: the dataset's templates.
        which: "select" for seven of ImageNet's templates, "all" for all eighty.
        dataset: the dataset's name.
    """
    if isinstance(own, Prompts) and own.sentences:
        return own
    templates = list(IMAGENET_TEMPLATES_SELECT if which == "select" else IMAGENET_TEMPLATES)
    return templates if dataset == "ImageNet" else [*templates, *(one for one in own if one not in templates)]
