"""Features of frozen towers: encoded once, kept between runs, handed out in batches."""

from .cache_key import feature_slot
from .encoder import Batch, FeatureSet, ImageEncoder
from .kept_views import FrozenPart, ViewLoader
from .loaders import FeatureLoader, KnownFeatures, OneStep, TrainingFeatures, collect_features
from .memory import remembered_features
from .patches import PatchEncoder, PatchReader, features_and_patches, read_blocks
from .views import Mirror, SeededViews

__all__ = [
    "Batch",
    "FeatureLoader",
    "FeatureSet",
    "FrozenPart",
    "ImageEncoder",
    "KnownFeatures",
    "Mirror",
    "OneStep",
    "PatchEncoder",
    "PatchReader",
    "SeededViews",
    "TrainingFeatures",
    "ViewLoader",
    "collect_features",
    "feature_slot",
    "features_and_patches",
    "read_blocks",
    "remembered_features",
]
