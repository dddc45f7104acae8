"""Tip-Adapter and its kin: a cache of the training images' features beside zero-shot CLIP."""

from .tip import TipAdapter, TipAdapterF
from .tipx import TipAdapterPP, TipX, TipXPP

__all__ = ["TipAdapter", "TipAdapterF", "TipAdapterPP", "TipX", "TipXPP"]
