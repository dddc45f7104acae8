"""DLR-CLIP: cross-modal adapter (CMA), gate logit refiner (GLR) and smoothed knowledge distillation (SKD)."""

from .trainer import DLRCLIP

__all__ = ["DLRCLIP"]
