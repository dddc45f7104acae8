"""Export trained classifiers to files that other programs run: ONNX, TorchScript, open_clip."""

from .exporting import export_classifier, export_model
from .forms import FORMATS, ExportError, formats_of
from .measures import ExportReport

__all__ = ["FORMATS", "ExportError", "ExportReport", "export_classifier", "export_model", "formats_of"]
