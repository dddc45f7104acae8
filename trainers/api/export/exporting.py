"""Export a run or a saved classifier: write the file, run it, compare it with predict.py, and only then keep it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dassl.utils import InputError

from ..images import as_files, list_images
from ..runs import apart
from .forms import FOLDERS, SUFFIXES, ExportError, check_format, check_known, first_line
from .measures import TOLERANCE, ExportReport, Row, Run, measure
from .module import Exported
from .subject import Examples, Listed, Subject, list_examples, load_subject, method_of, read_examples, thinned

FORM = 1  # number of the form that the record has
EXAMPLE = 3  # images that a graph is made with; more than one, so that their number is not taken for a constant


def export_model(
    source: str | os.PathLike[str],
    file: str | os.PathLike[str] | None = None,
    *,
    format: str = "onnx",
    images: Sequence[str] = (),
    with_preprocessing: bool = False,
    half: bool = False,
    int8: bool = False,
    weights: str | None = None,
    verbose: bool = False,
    listed: Listed | None = None,
) -> ExportReport:
    """Export a trained method: images in, probabilities of the main head out, with the temperature inside.

    Args:
        source: the folder of a finished run, or a file that FewShotClassifier.save has written.
        file: what to write; for openclip and peft a folder. None: beside the source, or in the run's folder.
        format: "onnx", "torchscript", "openclip" or "peft".
        images: files and folders of images to compare on; (): the run's validation images, else made-up ones.
        with_preprocessing: the input is uint8 [B, H, W, 3], already of the model's size, and is normalized inside.
        half: also write a file in half precision (onnx).
        int8: also write a file with int8 weights (onnx).
        weights: a local file of the backbone's weights; None: those that the run names, or those of the cache.
        verbose: whether to show lines and progress bars.
        listed: files, labels and name of the images to compare on, where the caller knows them; in place of `images`.

    Raises:
        InputError: something given is wrong.
        ExportError: the method cannot be exported, or the file gives other probabilities than predict.py; nothing is
            kept.
    """
    source = os.fspath(source)
    check_known(format)
    if format != "onnx" and (half or int8):
        raise InputError(f"Expected the format onnx with {'half' if half else 'int8'} but got {format}")
    if format in FOLDERS and with_preprocessing:
        raise InputError(
            f"Expected the format onnx or torchscript with preprocessing inside but got {format}, which holds weights "
            "alone"
        )
    check_format(format, *method_of(source))
    target = _target(source, file, format)
    with apart(1, verbose, warnings=verbose):
        subject = load_subject(source, weights)
        if with_preprocessing and "instance_norm" in subject.model.trainer.cfg.INPUT.TRANSFORMS:
            raise InputError("Expected INPUT.TRANSFORMS without instance_norm with preprocessing inside but got it")
        with tempfile.TemporaryDirectory(prefix="dlr_clip_") as folder:
            examples = read_examples(subject, listed or list_examples(subject, images, Path(folder)))
        with _staged(target) as staging:
            making = _Making(subject, examples, with_preprocessing, staging / target.name)
            if format == "onnx":
                making.onnx(half, int8)
            elif format == "torchscript":
                making.torchscript()
            elif format == "openclip":
                making.openclip()
            else:
                making.peft()
            return _kept(making.report(format), target.parent)


def export_classifier(
    classifier: Any, file: str | os.PathLike[str], *, images: Any = None, format: str = "onnx", **options: Any
) -> ExportReport:
    """Export a fitted FewShotClassifier.

    Args:
        classifier: a fitted FewShotClassifier.
        file: what to write; for openclip and peft a folder.
        images: images to compare on, in any form that `predict` takes; None: those that the classifier was validated
            on, where their files are still there, else made-up ones.
        format, options: see `export_model`.

    Raises:
        InputError, ExportError: see `export_model`.
    """
    trainer = classifier._trainer
    check_format(format, classifier.method_, type(trainer))
    with tempfile.TemporaryDirectory(prefix="dlr_clip_") as folder:
        if images is None:
            items = [item for item in trainer.dm.dataset.val or () if Path(item.impath).is_file()]
            listed: Listed = [item.impath for item in items], [item.label for item in items], "validation images"
        else:
            listed = as_files(list_images(images), Path(folder)), None, "images given"
        saved = Path(folder, "classifier.safetensors")
        classifier.save(saved)
        weights = trainer.cfg.MODEL.BACKBONE.WEIGHTS or None
        return export_model(
            saved, file, format=format, weights=weights, listed=thinned(*listed) if listed[0] else None, **options
        )


def _target(source: str, file: str | os.PathLike[str] | None, format: str) -> Path:
    if file is not None:
        target = Path(file)
    elif Path(source).is_dir():
        target = Path(source, f"model{SUFFIXES[format]}")
    else:
        target = Path(source).with_name(Path(source).stem + SUFFIXES[format])
    if format in FOLDERS and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"Expected the output of {format} to be a new or an empty folder but {target} is there")
    if format not in FOLDERS and target.is_dir():
        raise InputError(f"Expected the output of {format} to be a file but {target} is a folder")
    if Path(source).is_file() and target.exists() and target.samefile(source):
        raise InputError(f"Expected the output to be another file than {source}")
    return target


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Give a new folder beside the target, so that what is in it can be renamed to it; it is removed at the end."""
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"Expected to write {target} but got: {error.strerror or error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kept(report: ExportReport, folder: Path) -> ExportReport:
    """Move what has been written to its place, and return the report with these places."""
    places = tuple(folder / path.name for path in report.files)
    for path, place in zip(report.files, places, strict=True):
        os.replace(path, place)
    return replace(report, files=places)


class _Making:
    """Write one format into a folder, run what is written, and compare it with predict.py.

    Args:
        subject: what is exported.
        examples: images to compare on.
        with_preprocessing: whether the input is pixels.
        path: the file to write, or the folder.
    """

    def __init__(self, subject: Subject, examples: Examples, with_preprocessing: bool, path: Path) -> None:
        self.subject, self.examples, self.path = subject, examples, path
        self.rows: list[Row] = []
        self.written: list[Path] = []
        preparing = subject.preprocessing
        pixels = (preparing["mean"], preparing["std"]) if with_preprocessing else None
        self.inputs = examples.inputs if pixels is None else examples.pixels(*pixels)
        self.input = "pixels" if with_preprocessing else "images"
        self.module = Exported(subject.model.trainer, subject.model.temperature, pixels).eval()
        self.example = self.inputs[torch.arange(EXAMPLE) % len(self.inputs)]
        self._check("PyTorch", self.module)

    def _check(self, name: str, run: Run, size: int = 0, strict: bool = True) -> None:
        """Measure what has been written.

        Raises:
            ExportError: it does not run, a probability is not finite or, if `strict`, differs from predict.py's.
        """
        try:
            row, finite = measure(name, run, self.inputs, self.examples, size)
        except Exception as error:  # a runtime can refuse a graph in many ways
            told = f"{type(error).__name__}: {first_line(error)}"
            raise ExportError(f"Expected {name} to run but got {told}: nothing is kept") from error
        if not finite or (strict and not row.difference <= TOLERANCE):
            least = f"within {TOLERANCE:g} of predict.py's" if strict else "that are finite"
            raise ExportError(
                f"Expected {name} to give probabilities {least} but the largest difference is {row.difference:.2g}, on "
                f"{self.examples.told}: nothing is kept"
            )
        self.rows.append(row)

    def record(self, **further: Any) -> dict[str, Any]:
        """Return what a program has to know to use the file, as plain values."""
        model, cfg = self.subject.model, self.subject.model.trainer.cfg
        shape = ["batch", *self.inputs.shape[1:]]
        return {
            "form": FORM,
            "method": self.subject.method,
            "backbone": cfg.MODEL.BACKBONE.NAME,
            "head": model.trainer.main_head,
            "classes": model.names,
            "class_names": self.subject.class_names,
            "temperature": model.temperature,
            "threshold": model.threshold,
            "input": {"name": self.input, "shape": shape, "type": str(self.inputs.dtype).removeprefix("torch.")},
            "preprocessing": self.subject.preprocessing,
            "normalizes": self.input == "pixels",
            "torch": torch.__version__,
            **further,
        }

    def measured(self) -> dict[str, Any]:
        """Return what has been measured so far, as plain values."""
        return self.report("").to_dict()

    def report(self, format: str) -> ExportReport:
        """Return the report of what has been written."""
        told, threads = self.examples.told, torch.get_num_threads()
        return ExportReport(tuple(self.written), format, self.subject.method, told, threads, tuple(self.rows))

    def onnx(self, half: bool, int8: bool) -> None:
        """Write ONNX files; see `export_model`."""
        from . import onnx_file  # it needs packages that the other formats do not

        proto, exporter = self._first_onnx()
        made = {self.path: (proto, "fp32")}
        if half:
            made[self._named("fp16")] = onnx_file.half_of(proto), "fp16"
        if int8:
            made[self._named("int8")] = onnx_file.int8_of(proto), "int8"
        for path, (one, precision) in made.items():
            if precision != "fp32":
                onnx_file.write_onnx(one, path, "")
                self._check(path.name, onnx_file.run_onnx(path), path.stat().st_size, strict=False)
        for path, (one, precision) in made.items():
            record = self.record(exporter=exporter, precision=precision, measured=self.measured())
            before = onnx_file.run_onnx(path)(self.example)
            onnx_file.write_onnx(one, path, json.dumps(record))
            _same(path, before, onnx_file.run_onnx(path)(self.example))
        self.written = list(made)

    def _first_onnx(self) -> tuple[Any, str]:
        """Write the ONNX file in fp32, by the first exporter whose file gives predict.py's probabilities.

        Returns:
            The model, and the exporter.

        Raises:
            ExportError: there is no such exporter.
        """
        from . import onnx_file

        failures = []
        for exporter in onnx_file.EXPORTERS:
            try:
                proto = onnx_file.to_onnx(self.module, self.example, self.input, exporter)
                onnx_file.write_onnx(proto, self.path, "")
                self._check(self.path.name, onnx_file.run_onnx(self.path), self.path.stat().st_size)
                return proto, exporter
            except ExportError as error:
                failures.append(str(error))
        raise ExportError("; ".join(failures))

    def _named(self, precision: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{precision}{self.path.suffix}")

    def torchscript(self) -> None:
        """Write a TorchScript file."""
        from .torchscript_file import run_torchscript, to_torchscript, write_torchscript

        traced = to_torchscript(self.module, self.example)
        write_torchscript(traced, self.path, json.dumps(self.record()))
        self._check(self.path.name, run_torchscript(self.path), self.path.stat().st_size)
        before = run_torchscript(self.path)(self.example)
        write_torchscript(traced, self.path, json.dumps(self.record(measured=self.measured())))
        _same(self.path, before, run_torchscript(self.path)(self.example))
        self.written = [self.path]

    def openclip(self) -> None:
        """Write a folder for open_clip.

        Raises:
            ExportError: the backbone is taken as a whole.
        """
        from .openclip_folder import run_openclip, size_of, write_openclip, write_record

        clip = self.subject.model.trainer.network.clip
        if not clip.has_blocks:
            raise ExportError(
                f"Expected a plain CLIP for the format openclip but {clip.name} is taken as a whole, and has weights "
                "of its own names (onnx and torchscript work): nothing is kept"
            )
        write_openclip(self.subject, self.path, self.record())
        self._check(self.path.name, run_openclip(self.path), size_of(self.path))
        write_record(self.path, self.record(measured=self.measured()))
        self.written = [self.path]

    def peft(self) -> None:
        """Write a folder for PEFT."""
        from .openclip_folder import size_of, write_record
        from .peft_folder import run_peft, write_peft_of

        write_peft_of(self.subject, self.path)
        self._check(self.path.name, run_peft(self.path, self.subject, self.module), size_of(self.path))
        write_record(self.path, self.record(measured=self.measured()))
        self.written = [self.path]


def _same(path: Path, before: Tensor, after: Tensor) -> None:
    """Check that a file that has been written again computes what it did.

    Raises:
        ExportError: it does not.
    """
    if not torch.allclose(before, after, atol=TOLERANCE):
        raise ExportError(f"Expected {path.name} to compute the same after its record was added: nothing is kept")
