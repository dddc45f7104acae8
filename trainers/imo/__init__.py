"""Intra-modal overlap correction: adapters for comparing CLIP's image features, their trainers, measures and file.

Kravets and Namboodiri, CLIP Adaptation by Intra-modal Overlap Reduction, 2024.
"""

from .adapters import IMOAdapters, add_imo_weights, check_adapters, load_adapters, read_recipe, save_adapters
from .measures import Measures, draw_histograms, measure
from .trainer import IMO, IMODINO

__all__ = [
    "IMO",
    "IMODINO",
    "IMOAdapters",
    "Measures",
    "add_imo_weights",
    "check_adapters",
    "draw_histograms",
    "load_adapters",
    "measure",
    "read_recipe",
    "save_adapters",
]
