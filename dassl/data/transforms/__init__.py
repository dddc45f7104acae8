"""Image transforms, chosen by name in the config."""

from .transforms import AVAI_CHOICES, INTERPOLATION_MODES, build_transform, least_side, to_float_tensor

__all__ = ["AVAI_CHOICES", "INTERPOLATION_MODES", "build_transform", "least_side", "to_float_tensor"]
