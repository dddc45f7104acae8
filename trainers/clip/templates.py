"""Prompt templates per dataset and zero-shot weights.

The templates are those of the few-shot CLIP literature (CoOp's zero-shot CLIP; Tip-Adapter uses the same strings).
"""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

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

# All eighty of them.
IMAGENET_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)

_CHUNK = 512  # prompts encoded at once: bounds memory at thousands of classes


def clean_classname(name: str) -> str:
    """Class name as it appears in a prompt: underscores become spaces, nothing else changes."""
    return name.replace("_", " ")


def fill_template(template: str, classname: str) -> str:
    """The template's prompt for one class; ValueError unless the template has exactly one ``{}``."""
    if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
        raise ValueError(f"Expected a prompt template to contain {{}} exactly once but got {template!r}")
    return template.replace("{}", clean_classname(classname))


def templates_for(dataset_name: str, override: str = "") -> list[str]:
    """Zero-shot templates of a dataset.

    Args:
        dataset_name: the dataset's registry name; an unknown one gets the general template.
        override: used instead when not empty (DATASET.TEMPLATE).
    """
    template = override or TEMPLATES.get(dataset_name, DEFAULT_TEMPLATE)
    fill_template(template, "")
    return [template]


@torch.no_grad()
def zeroshot_weights(clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Zero-shot classifier: each prompt normalised, mean over templates, normalised again.

    Args:
        classnames: C names as the dataset spells them.
        templates: at least one template with one ``{}`` each.

    Returns:
        fp32 weights [C, E] with unit rows, on CLIP's device.
    """
    if not classnames or not templates:
        raise ValueError(f"Expected at least one class and one template but got {len(classnames)} and {len(templates)}")
    total = torch.zeros(len(classnames), clip.embed_dim, device=clip.device)
    for template in templates:  # one template at a time: its leading words are then shared by all prompts
        prompts = [fill_template(template, name) for name in classnames]
        chunks = [prompts[i : i + _CHUNK] for i in range(0, len(prompts), _CHUNK)]
        total += torch.cat([F.normalize(clip.encode_text(chunk).float(), dim=-1) for chunk in chunks])
    return F.normalize(total / len(templates), dim=-1)


@torch.no_grad()
def mean_text_features(clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Mean over the templates of each class's text features as CLIP gives them, not normalised: fp32 [C, E]."""
    total = torch.zeros(len(classnames), clip.embed_dim, device=clip.device)
    for template in templates:
        prompts = [fill_template(template, name) for name in classnames]
        chunks = [prompts[i : i + _CHUNK] for i in range(0, len(prompts), _CHUNK)]
        total += torch.cat([clip.encode_text(chunk).float() for chunk in chunks])
    return total / len(templates)
