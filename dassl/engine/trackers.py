"""Send a run's curves and pictures to Weights & Biases or MLflow, beside TensorBoard's event file.

Where they go is up to these packages: WANDB_MODE=offline keeps a run in its own folder (``wandb sync`` sends it later),
MLFLOW_TRACKING_URI names a server, or else a database below the run's folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dassl.utils import InputError
from dassl.utils.packages import needed_package

logger = logging.getLogger(__name__)

LOGGERS = ("tensorboard", "wandb", "mlflow")
PROJECT = "dlr-clip"  # of Weights & Biases (WANDB_PROJECT overrules it), and MLflow's experiment
RUN_FILE = "mlflow_run.txt"  # in the run's folder: the id of its MLflow run, to go on with


class Tracker(Protocol):
    """Take what a run shows: numbers, pictures, settings."""

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Take a number."""

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Take a picture, uint8 [H, W, 3]."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """Take the settings of the run."""

    def close(self) -> None:
        """Send what is left."""


def check_logger(name: str) -> None:
    """Check the key LOGGER, and that its package is there.

    Raises:
        InputError: no such logger, or its package is not installed.
    """
    if name not in LOGGERS:
        raise InputError(f"Expected LOGGER to be one of {', '.join(LOGGERS)} but got {name!r}")
    if name != "tensorboard":
        needed_package(name, f"LOGGER {name}")


def open_tracker(name: str, folder: str | os.PathLike[str]) -> Tracker | None:
    """Return the tracker that LOGGER names; None for TensorBoard alone, or where the tracker cannot be opened.

    A run does not end because its curves cannot be sent: a warning says so.

    Args:
        name: see LOGGERS.
        folder: the run's output folder. A resumed run goes on in the tracker, too.
    """
    if name == "tensorboard":
        return None
    try:
        return _Careful(name, (WandbTracker if name == "wandb" else MLflowTracker)(Path(folder)))
    except Exception as error:  # whatever a server, a missing login or a broken file makes these packages raise
        logger.warning("LOGGER %s cannot be opened, its curves are in TensorBoard alone: %s", name, _first_line(error))
        return None


class _Careful:
    """Pass everything on until an error comes, which is told once."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._broken = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._tracker, name)

        def careful(*args: Any) -> None:
            if self._broken:
                return
            try:
                method(*args)
            except Exception as error:  # see open_tracker
                self._broken = True
                logger.warning("LOGGER %s: its curves end here: %s", self._name, _first_line(error))

        return careful


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class WandbTracker:
    """Send to Weights & Biases. The step of a tag is its own: of batches in training, of epochs in evaluations."""

    def __init__(self, folder: Path) -> None:
        import wandb

        place = folder.absolute()
        place.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(place),
            name="/".join(place.parts[-4:]),
            id=hashlib.sha256(str(place).encode("utf-8", "surrogateescape")).hexdigest()[:16],
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", disable_code=True, x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="step")

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Take a number."""
        self._run.log({tag: value, "step": step})

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Take a picture."""
        self._run.log({tag: self._wandb.Image(image), "step": step})

    def settings(self, values: Mapping[str, Any]) -> None:
        """Take the settings."""
        self._run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflowTracker:
    """Send to MLflow."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own parts, at its import
            from mlflow.tracking import MlflowClient

        place = folder.absolute()
        place.mkdir(parents=True, exist_ok=True)
        for name in ("mlflow", "alembic"):  # they tell how they make their database
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        known, note = None, place / RUN_FILE
        if note.exists():
            known = note.read_text(encoding="utf-8").strip()
        if known is None:
            found = self._client.get_experiment_by_name(PROJECT)
            artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (place / "mlflow").as_uri()
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT, artifacts)
            known = self._client.create_run(experiment, run_name="/".join(place.parts[-4:])).info.run_id
            note.write_text(known, encoding="utf-8")
        self._id = known
        self._client.update_run(self._id, status="RUNNING")

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Take a number."""
        self._client.log_metric(self._id, tag.replace("@", "_at_"), value, step=step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Take a picture, as a file of the run."""
        self._client.log_image(self._id, image, artifact_file=f"{tag.replace('/', '_')}_{step}.png")

    def settings(self, values: Mapping[str, Any]) -> None:
        """Take the settings; a resumed run has them already."""
        there = self._client.get_run(self._id).data.params
        for name, value in values.items():
            if name not in there:
                self._client.log_param(self._id, name, str(value)[:500])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)
