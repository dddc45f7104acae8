"""The one place that knows CLIP: weights, tokens, prompts, and running the blocks with a method's edits.

This package is plain torch over open_clip's modules; it knows neither the toolbox nor the datasets.
"""

from .alike import tell_alike
from .backbones import BACKBONES, check_backbone, is_resnet, why_no_blocks
from .config import add_clip_config
from .descriptions import Prompts, read_descriptions, sentences_of
from .edits import BlockEdit, kinds
from .load import load_clip
from .model import CLIP
from .preprocess import complete_input, preprocessing_of, tell_preprocessing
from .templates import (
    DEFAULT_TEMPLATE,
    IMAGENET_FAMILY,
    IMAGENET_TEMPLATES,
    IMAGENET_TEMPLATES_SELECT,
    IMAGENET_TEMPLATES_SELECT_OWN,
    clean_classname,
    fill_template,
    mean_text_features,
    sentence_features,
    templates_for,
    zeroshot_weights,
)
from .text import PromptTokens, TextState, TextTower
from .tiny import save_tiny
from .vision import VisionTower

__all__ = [
    "sentences_of",
    "sentence_features",
    "read_descriptions",
    "Prompts",
    "BACKBONES",
    "CLIP",
    "DEFAULT_TEMPLATE",
    "IMAGENET_FAMILY",
    "IMAGENET_TEMPLATES",
    "IMAGENET_TEMPLATES_SELECT",
    "IMAGENET_TEMPLATES_SELECT_OWN",
    "BlockEdit",
    "PromptTokens",
    "TextState",
    "TextTower",
    "VisionTower",
    "add_clip_config",
    "check_backbone",
    "clean_classname",
    "complete_input",
    "fill_template",
    "is_resnet",
    "kinds",
    "load_clip",
    "mean_text_features",
    "preprocessing_of",
    "save_tiny",
    "tell_alike",
    "tell_preprocessing",
    "templates_for",
    "why_no_blocks",
    "zeroshot_weights",
]
