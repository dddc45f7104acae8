"""Write and run TorchScript files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .forms import ExportError, first_line
from .measures import Run
from .onnx_file import quiet

RECORD = "dlr_clip.json"  # the extra file that holds the record


def to_torchscript(module: nn.Module, example: Tensor) -> Any:
    """Convert a module to TorchScript by a trace, and check it with other numbers of images than it was made with.

    Args:
        module: takes one tensor.
        example: an input with more than one image.

    Raises:
        ExportError: it cannot be traced, or the trace computes something else.
    """
    try:
        with torch.no_grad(), quiet():
            return torch.jit.trace(
                module, (example,), check_trace=True, check_tolerance=1e-4,
                check_inputs=[(example[:1],), (example.repeat(2, *[1] * (example.ndim - 1)),)],
            )  # fmt: skip
    except Exception as error:  # a graph can fail in many ways
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ExportError(f"torch.jit.trace cannot export this method: {told}") from error


def write_torchscript(traced: Any, path: Path, record: str) -> None:
    """Write a traced module with a record in an extra file.

    Two things that torch adds are left out: where the traced sources lie on this machine, and the images of the trace.
    """
    whole = path.with_name(f"{path.name}.whole")
    with quiet():
        torch.jit.save(traced, str(whole), _extra_files={RECORD: record})
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl") and "/traced_inputs" not in entry.filename:
                target.writestr(zipfile.ZipInfo(entry.filename, entry.date_time), source.read(entry))
    whole.unlink()


def run_torchscript(path: Path) -> Run:
    """Return what runs a TorchScript file on the processor."""
    with quiet():
        loaded = torch.jit.load(str(path), map_location="cpu")

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        return loaded(images)

    return run
