"""Intra-modal overlap correction: trainers of adapters for comparing CLIP's image features, and their measures.

Kravets and Namboodiri, CLIP Adaptation by Intra-modal Overlap Reduction, 2024.
"""

from .measures import Measures, draw_histograms, measure
from .trainer import IMO, IMODINO

__all__ = ["IMO", "IMODINO", "Measures", "draw_histograms", "measure"]
