"""Write and run ONNX files: in fp32, in half precision, and with int8 weights."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .forms import ExportError, first_line
from .measures import Run

OPSET = 18
KEY = "dlr_clip"  # of the metadata
OUTPUT = "probabilities"
EXPORTERS = ("dynamo", "torchscript")  # torch's; a file of the first that gives predict.py's probabilities is kept


def to_onnx(module: nn.Module, example: Tensor, name: str, exporter: str) -> Any:
    """Return an ONNX model of a module, in which the number of images is free.

    Args:
        module: takes one tensor.
        example: an input with more than one image.
        name: of the input.
        exporter: one of EXPORTERS.

    Raises:
        ExportError: it cannot be made.
    """
    try:
        with quiet():
            return _by_dynamo(module, example, name) if exporter == "dynamo" else _by_trace(module, example, name)
    except Exception as error:  # a graph can fail in many ways
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ExportError(f"torch.onnx.export ({exporter}) cannot export this method: {told}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and progress lines of torch and its exporters off the console within this block.

    Whether they matter is decided by running the file.
    """
    names = ("torch", "torch.onnx", "torch.fx", "onnxscript", "onnx_ir", "root")
    loggers = [logging.getLogger(name if name != "root" else None) for name in names]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _by_dynamo(module: nn.Module, example: Tensor, name: str) -> Any:
    import onnx_ir

    # Before torch 2.8 a batch without an upper bound is refused: products of sizes could overflow.
    shapes = ({0: torch.export.Dim("batch", max=2**31)},)
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=[name], output_names=[OUTPUT], verbose=False
        )
    assert made is not None
    return _tidied(onnx_ir.serde.serialize_model(made.model))


def _by_trace(module: nn.Module, example: Tensor, name: str) -> Any:
    import onnx

    with tempfile.TemporaryDirectory(prefix="dlr_clip_") as folder:
        path = str(Path(folder, "model.onnx"))
        torch.onnx.export(
            module, (example,), path, dynamo=False, opset_version=OPSET, input_names=[name], output_names=[OUTPUT],
            dynamic_axes={name: {0: "batch"}, OUTPUT: {0: "batch"}},
        )  # fmt: skip
        return _tidied(onnx.load(path))


def _tidied(proto: Any) -> Any:
    """Return the model without the exporter's notes, which name source files, and with equal weights stored once."""
    import onnx_ir
    from onnx_ir.passes import common

    model = onnx_ir.serde.deserialize_model(proto)
    common.ClearMetadataAndDocStringPass()(model)
    common.DeduplicateInitializersPass(size_limit=2**31)(model)
    return onnx_ir.serde.serialize_model(model)


def half_of(proto: Any) -> Any:
    """Return an ONNX model with weights and computations in half precision; input and output stay as they are."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    kept = [*DEFAULT_OP_BLOCK_LIST, "ScatterND"]  # sums by class; onnxruntime has none in half precision
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    with quiet():
        return convert_float_to_float16(copy, keep_io_types=True, op_block_list=kept)


def int8_of(proto: Any) -> Any:
    """Return an ONNX model whose matrices are int8; what they are multiplied by is rounded to int8 as it comes."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="dlr_clip_") as folder, quiet():
        before, after = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        onnx.save(proto, str(before))
        quantize_dynamic(before, after, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
        return onnx.load(str(after))


def write_onnx(proto: Any, path: Path, record: str) -> None:
    """Write an ONNX model with a record in its metadata.

    Raises:
        ExportError: it has more than two gigabytes, which the format does not allow in one file.
    """
    import onnx

    onnx.helper.set_model_props(proto, {KEY: record})
    try:
        content = proto.SerializeToString()
    except ValueError as error:  # protobuf's limit
        raise ExportError(f"an ONNX file holds at most 2 GB, and this model has more: {first_line(error)}") from error
    path.write_bytes(content)


def run_onnx(path: Path) -> Run:
    """Return what runs an ONNX file on the processor, by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as PyTorch, so that both can be compared
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {name: images.numpy()})[0])

    return run


def read_record(path: Path) -> Mapping[str, str]:
    """Return the metadata of an ONNX file."""
    import onnx

    return {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}
