"""Keep a fitted classifier in one file: safetensors, with the rest as JSON in its header; never a pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import InputError, atomic_write
from dassl.utils.cli import SETUP_ERRORS, given_wrongly

from ..app.configuration import default_cfg
from ..app.prediction import ClassesOnly, load_trainer, model_arguments
from .report import Report
from .runs import Choice, apart, is_path, wrong_input_told

KEY = "dlr_clip"  # of the JSON in the header
FORM = 1  # number of the form that the JSON has
PLACES = ("DATASET.ROOT", "OUTPUT_DIR", "RESUME", "MODEL.BACKBONE.WEIGHTS")  # of the maker's machine, left out


def save_file(classifier: Any, file: str | os.PathLike[str]) -> None:
    """Save a fitted FewShotClassifier; see there."""
    trainer = classifier._trainer
    cfg = trainer.cfg.clone()
    cfg.defrost()
    if trainer.needs_training_images:
        raise InputError(f"Expected a method that predicts without its training images but got {cfg.TRAINER.NAME}")
    if cfg.MODEL.get("IMO_WEIGHTS", ""):
        raise InputError("Expected a classifier on CLIP's own features but MODEL.IMO_WEIGHTS names a file beside it")
    descriptions = Path(cfg.DATASET.DESCRIPTIONS).read_text(encoding="utf-8") if cfg.DATASET.DESCRIPTIONS else ""
    cfg.merge_from_list([word for key in (*PLACES, "DATASET.DESCRIPTIONS") for word in (key, "")])
    tensors: dict[str, Tensor] = {}
    for model in trainer.get_model_names():
        for name, value in trainer._models[model].state_dict().items():
            tensors[f"{model}/{name}"] = value.detach().cpu().clone().contiguous()
    record = {
        "form": FORM,
        "method": cfg.TRAINER.NAME,
        # A file of one's own has a path of this machine; the settings in it are in "config" anyway.
        "config_name": "" if is_path(classifier.config_) else classifier.config_,
        "config": cfg.dump(),
        "descriptions": descriptions,
        "classes": classifier.classes_.tolist(),
        "class_names": classifier.class_names_,
        "images": list(classifier.n_images_.values()),
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "weights_digest": trainer.network.clip.weights_digest,
        "preprocessing": {
            "size": list(cfg.INPUT.SIZE),
            "interpolation": cfg.INPUT.INTERPOLATION,
            "squash": cfg.INPUT.SQUASH,
            "mean": list(cfg.INPUT.PIXEL_MEAN),
            "std": list(cfg.INPUT.PIXEL_STD),
        },
        "models": trainer.get_model_names(),
        "selected": trainer.selected,
        "temperature": classifier.temperature_,
        "threshold": classifier.threshold_,
        "report": classifier._report.to_dict(),
    }
    content = to_bytes(tensors, metadata={KEY: json.dumps(record)})
    try:
        with atomic_write(file, "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise InputError(f"Expected to write {os.fspath(file)} but got: {error.strerror or error}") from error


def read_file(file: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record and the tensors of a saved classifier.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    path = os.fspath(file)
    if not os.path.isfile(path):
        raise InputError(f"Expected a file that FewShotClassifier.save has written but there is none at {path}")
    try:
        with safe_open(path, framework="pt") as stream:
            text = (stream.metadata() or {}).get(KEY, "")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  # it is no dict
        record = json.loads(text)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"Expected {path} to be a file that FewShotClassifier.save has written: {error}") from error
    if not isinstance(record, dict) or record.get("form") != FORM:
        form = record.get("form") if isinstance(record, dict) else None
        raise InputError(f"Expected {path} to have form {FORM} but got {form!r}: it is another version's")
    return record, tensors


def load_trainer_of(
    file: str | os.PathLike[str],
    weights: str | None,
    device: str,
    batch_size: int | None = None,
    precision: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Return the trainer of a saved classifier, ready to classify, and the file's record.

    Args:
        file: the file.
        weights: a local file of the backbone's weights; None: those of the cache, or downloaded once.
        device: "auto", "cpu" or "cuda".
        batch_size: images at a time; None: the method's own number.
        precision: such as "fp32"; None: the method's own.

    Raises:
        InputError: the file is damaged, or was made for other weights of the backbone.
    """
    record, tensors = read_file(file)
    path = os.fspath(file)
    with tempfile.TemporaryDirectory(prefix="dlr_clip_") as folder:
        try:
            stored = Path(folder, "config.yaml")
            stored.write_text(record["config"], encoding="utf-8")
            cfg = default_cfg()
            cfg.merge_from_file(stored)
            if record["method"] not in TRAINER_REGISTRY.registered_names():
                raise InputError(f"Expected {path} to be of a registered method but got {record['method']}")
            cfg.OUTPUT_DIR = folder
            cfg.MODEL.BACKBONE.WEIGHTS = weights or ""
            cfg.DATALOADER.TEST.BATCH_SIZE = batch_size or cfg.DATALOADER.TEST.BATCH_SIZE
            if device != "auto":
                cfg.USE_CUDA = device == "cuda"
            node = cfg.TRAINER[TRAINER_REGISTRY.get(record["method"]).config_node()]
            if precision is not None and "PREC" in node:
                node.PREC = precision
            if record["descriptions"]:
                cfg.DATASET.DESCRIPTIONS = str(Path(folder, "descriptions.json"))
                Path(cfg.DATASET.DESCRIPTIONS).write_text(record["descriptions"], encoding="utf-8")
            cfg.freeze()
            trainer = build_trainer(cfg, ClassesOnly(record["class_names"], None), [])
            digest = trainer.network.clip.weights_digest
            if digest != record["weights_digest"]:
                raise InputError(
                    f"Expected the weights of {record['backbone']} that {path} was made for (digest "
                    f"{record['weights_digest'][:12]}...) but got others ({digest[:12]}...)"
                )
            for model in record["models"]:
                state = {
                    name.removeprefix(f"{model}/"): value
                    for name, value in tensors.items() if name.startswith(f"{model}/")
                }  # fmt: skip
                trainer.take_checkpoint({"state_dict": state, "engine": {"selected": record["selected"]}}, path)
        except (KeyError, AttributeError, *SETUP_ERRORS) as error:
            if isinstance(error, KeyError | AttributeError) or given_wrongly(error):
                raise InputError(f"Expected {path} to be a whole file of this version but got: {error}") from error
            raise
    trainer.set_model_mode("eval")
    return trainer, record


def load_file(cls: Any, file: str | os.PathLike[str], weights: str | None, device: str, verbose: bool) -> Any:
    """Load a FewShotClassifier; see there."""
    with apart(1, verbose):
        trainer, record = load_trainer_of(file, weights, device)
    found = cls(
        record["method"], record["backbone"], config=record["config_name"] or None, weights=weights, device=device,
        verbose=verbose,
    )  # fmt: skip
    counts = record["images"]
    return _filled(found, trainer, np.array(record["classes"]), record, Report.from_dict(record["report"]), counts)


def from_run(cls: Any, folder: str | os.PathLike[str], device: str, verbose: bool) -> Any:
    """Make a FewShotClassifier of the folder of a run; see there."""
    args = model_arguments(folder, device == "cpu")
    args.debug = verbose
    args.set = [["USE_CUDA", "True"]] if device == "cuda" else []
    with apart(1, verbose), wrong_input_told():
        trainer, names = load_trainer(args)
    cfg = trainer.cfg
    found = cls(cfg.TRAINER.NAME, cfg.MODEL.BACKBONE.NAME, device=device, verbose=verbose, calibration=None)
    choice = Choice(cfg.TRAINER.NAME)
    record = {"class_names": names, "temperature": 1.0, "threshold": None, "config_name": ""}
    facts = (("method", choice.shown), ("backbone", cfg.MODEL.BACKBONE.NAME), ("run", os.fspath(folder)))
    report = Report(choice.shown, len(names), 0, facts, ("What the run found is in its metrics.json.",))
    return _filled(found, trainer, np.array(names), record, report, ())


def _filled(
    found: Any, trainer: Any, classes: np.ndarray[Any, Any], record: Mapping[str, Any], report: Report, counts: Any
) -> Any:
    found.classes_, found.class_names_ = classes, list(record["class_names"])
    found.method_, found.config_ = found.method, record["config_name"]
    found.temperature_, found.threshold_ = record["temperature"], record["threshold"]
    found.n_images_ = dict(zip(classes.tolist(), counts, strict=False))
    found._trainer, found._report = trainer, report
    found._photos, found._held_out = [], {}  # it was handed on without them
    return found
