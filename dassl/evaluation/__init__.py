"""From logits and labels to numbers: the evaluator of one head, and the metrics of several."""

from .build import EVALUATOR_REGISTRY, build_evaluator
from .evaluator import Classification, EvaluatorBase
from .heads import HEAD_COLUMNS, HeadMetrics, heads_table, macro_f1

__all__ = [
    "EVALUATOR_REGISTRY",
    "HEAD_COLUMNS",
    "Classification",
    "EvaluatorBase",
    "HeadMetrics",
    "build_evaluator",
    "heads_table",
    "macro_f1",
]
