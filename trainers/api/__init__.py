"""The project for people who write Python: FewShotClassifier."""

from .classifier import FewShotClassifier
from .report import Report

__all__ = ["FewShotClassifier", "Report"]
