"""Keep what every head said about every image of a split, in one small file that figures are drawn from.

Legend: N images, C classes, H heads, K = min(5, C), M images whose features are kept, E width of a feature.

`predictions.safetensors` holds plain arrays and, as JSON in its metadata, names. For ImageNet's 50,000 images, 1,000
classes and five heads it takes 6 MB without the logits of all classes (which would take 1 GB) and without paths.

    labels       int32    [N]
    top          int16/32 [H, N, K]  classes by falling logit
    true         float32  [H, N]     logit of the true class
    rival        float32  [H, N]     largest logit of another class
    logsumexp    float32  [H, N]     over all classes: exp(true - logsumexp) is the true class's probability
    value/<name> float32  [N]        what a method tells of each image (DLR-CLIP: alpha, weight)
    rows         int32    [M]        images whose features are kept: up to 2,000, of up to 20 classes
    feature/<branch> float16 [M, E]
    logits       float32  [H, N, C]  where they fit
    paths        uint8    [bytes]    of the images, below `root`, each ended by a zero byte; where they fit
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from dassl.data.sharding import Share
from dassl.utils import InputError, atomic_write, distributed

logger = logging.getLogger(__name__)

PREDICTIONS, EVAL_PREDICTIONS = "predictions.safetensors", "predictions-eval.safetensors"
FORMAT = "1"
TOP = 5
FEATURE_CLASSES, FEATURE_IMAGES = 20, 2000
MEGABYTE = 1_000_000


@dataclass
class Predictions:
    """The content of the file; see the head of this module for types and shapes."""

    split: str
    main: str  # the head that counts as the method's accuracy
    reference: str  # the head that figures show as "before"; may be ""
    heads: list[str]
    classnames: list[str]
    labels: np.ndarray
    top: np.ndarray
    true: np.ndarray
    rival: np.ndarray
    logsumexp: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    features: dict[str, np.ndarray] = field(default_factory=dict)
    logits: np.ndarray | None = None
    paths: list[str] | None = None

    def head(self, name: str) -> int:
        """Return the position of a head along the first axis."""
        if name not in self.heads:
            raise InputError(f'Expected a head out of {", ".join(self.heads)} but got "{name}"')
        return self.heads.index(name)

    def correct(self, name: str) -> np.ndarray:
        """Return which images a head classifies correctly, as bool [N]."""
        return self.top[self.head(name), :, 0] == self.labels

    def confusion(self, name: str) -> np.ndarray:
        """Return counts [C, C] of a head, rows true, columns predicted."""
        classes = len(self.classnames)
        cells = self.labels.astype(np.int64) * classes + self.top[self.head(name), :, 0]
        return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


class Recorder:
    """Collect predictions batch by batch.

    Args:
        total: N, to know beforehand what fits.
        limit: bytes that the file may take.
        seed: chooses the classes and images whose features are kept.
    """

    def __init__(self, total: int, limit: int, seed: int = 0) -> None:
        self.total, self.limit = total, limit
        self._random = np.random.default_rng(max(seed, 0))
        self._parts: dict[str, list[np.ndarray]] = {}
        self._paths: list[str] = []
        self._heads: list[str] = []
        self._seen = 0
        self._keep_logits, self._classes = False, 0
        self._told: tuple[list[str], dict[str, Tensor], dict[str, Tensor]] = [], {}, {}
        self._chosen = np.zeros(0, np.int64)  # classes whose features are kept

    def tell(
        self,
        paths: Sequence[str] | None = None,
        values: Mapping[str, Tensor] | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Note what is known, beside logits, of the batch that is added next.

        Args:
            paths: of the B images.
            values: name -> [B] or [B, 1].
            features: branch -> [B, E].
        """
        self._told = list(paths or ()), dict(values or {}), dict(features or {})

    def add(self, heads: Mapping[str, Tensor], labels: Tensor, share: Share | None = None) -> None:
        """Add a batch: the logits [B, C] of each head and the labels [B].

        Args:
            heads, labels: of the whole batch.
            share: how processes share the batch; ``tell`` is then given this one's part only. None: it is not shared.
        """
        if not self._heads:
            self._start(heads)
        paths, values, features = self._told
        self._told = [], {}, {}
        if share is not None:
            values = {name: distributed.gather_rows(value, share.counts) for name, value in values.items()}
            features = {name: distributed.gather_rows(feature, share.counts) for name, feature in features.items()}
            paths = [path for part in distributed.gather_objects(paths[: share.size]) for path in part]
        logits = torch.stack([heads[name].detach().float() for name in self._heads])  # [H, B, C]
        index = labels.to(logits.device).long().expand(len(logits), -1)[..., None]  # [H, B, 1]
        known = labels.cpu().numpy()
        self._put("labels", known.astype(np.int32))
        # Not topk: here the first of classes with equal logits comes first, as it does for argmax.
        order = logits.sort(dim=2, descending=True, stable=True).indices[..., :TOP]
        small = logits.shape[2] <= np.iinfo(np.int16).max
        self._put("top", order.cpu().numpy().astype(np.int16 if small else np.int32))
        self._put("true", logits.gather(2, index)[..., 0])
        others = logits.scatter(2, index, float("-inf"))
        self._put("rival", others.amax(2))
        self._put("logsumexp", logits.logsumexp(2))
        if self._keep_logits:
            self._put("logits", logits)
        self._paths.extend(map(str, paths))
        for name, value in values.items():
            self._put(f"value/{name}", value.detach().float().reshape(len(labels)))
        if features:
            inside = np.flatnonzero(np.isin(known, self._chosen))
            self._put("rows", (self._seen + inside).astype(np.int32))
            for name, feature in features.items():
                kept = feature.detach()[torch.from_numpy(inside).to(feature.device)]
                self._put(f"feature/{name}", kept.half())
        self._seen += len(labels)

    def _start(self, heads: Mapping[str, Tensor]) -> None:
        self._heads = list(heads)
        classes = next(iter(heads.values())).shape[1]
        self._classes = classes
        self._keep_logits = 4 * len(heads) * self.total * classes <= self.limit
        self._chosen = np.sort(self._random.permutation(classes)[:FEATURE_CLASSES])

    def _put(self, name: str, array: np.ndarray | Tensor) -> None:
        self._parts.setdefault(name, []).append(array if isinstance(array, np.ndarray) else array.cpu().numpy())

    def finish(self, split: str, main: str, reference: str, names: Mapping[int, str]) -> Predictions | None:
        """Return the predictions, or what fits of them; None: no image was seen, or nothing fits.

        If not all fits, the logits are left out, then the paths, then the features.
        """
        if not self._seen:
            return None
        per_head = ("top", "true", "rival", "logsumexp", "logits")
        arrays = {name: np.concatenate(parts, axis=int(name in per_head)) for name, parts in self._parts.items()}
        features = {name: array for name, array in arrays.items() if name.startswith("feature/")}
        rows = arrays.get("rows", np.zeros(0, np.int32))
        if len(rows) > FEATURE_IMAGES:
            kept = np.sort(self._random.permutation(len(rows))[:FEATURE_IMAGES])
            rows, features = rows[kept], {name: array[kept] for name, array in features.items()}
        predictions = Predictions(
            split,
            main,
            reference if reference in self._heads else "",
            self._heads,
            [names.get(label, str(label)) for label in range(self._classes)],
            **{name: arrays[name] for name in ("labels", "top", "true", "rival", "logsumexp")},
            values=_below("value/", arrays),
            rows=rows,
            features=_below("feature/", features),
            logits=arrays.get("logits"),
            paths=self._paths if len(self._paths) == self._seen and any(self._paths) else None,
        )
        return _cut(predictions, self.limit)


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def _cut(predictions: Predictions, limit: int) -> Predictions | None:
    """Leave out what is least needed until the rest fits; None: it never fits."""
    smaller: list[dict[str, Any]] = [
        {},
        {"logits": None},
        {"paths": None},
        {"features": {}, "rows": np.zeros(0, np.int32)},
    ]
    for change in smaller:
        for name, value in change.items():
            setattr(predictions, name, value)
        if sum(array.nbytes for array in _arrays(predictions)[0].values()) <= limit:
            return predictions
    logger.warning("No predictions are kept: they take more than TEST.PREDICTIONS_MB")
    return None


def _arrays(predictions: Predictions) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays of the file, and the folder that its paths are below."""
    arrays = {name: getattr(predictions, name) for name in ("labels", "top", "true", "rival", "logsumexp", "rows")}
    arrays |= {f"value/{name}": array for name, array in predictions.values.items()}
    arrays |= {f"feature/{name}": array for name, array in predictions.features.items()}
    root = ""
    if predictions.logits is not None:
        arrays["logits"] = predictions.logits
    if predictions.paths is not None:
        root = _common_folder(predictions.paths)
        text = "".join(path[len(root) :] + "\0" for path in predictions.paths)
        arrays["paths"] = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
    return arrays, root


def _common_folder(paths: Sequence[str]) -> str:
    """Return the folder that all paths start with, with its last slash; "" where there is none."""
    prefix = os.path.commonprefix(list(paths))
    return prefix[: prefix.rfind("/") + 1]


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Write the file at once or not at all; the same predictions give the same bytes."""
    arrays, root = _arrays(predictions)
    names = {name: getattr(predictions, name) for name in ("split", "main", "reference", "heads", "classnames")}
    # One entry: the order of several would change from run to run.
    metadata = {"predictions": json.dumps({"format": FORMAT, **names, "root": root})}
    with atomic_write(path, "wb") as stream:
        stream.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def load_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Load the predictions of a run.

    Args:
        path: a run's folder, or the file.

    Raises:
        InputError: there is no such file, or the file is something else.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PREDICTIONS
    if not file.is_file():
        raise InputError(
            f"Expected {file} but there is none: a run writes it after its last test unless TEST.PREDICTIONS_MB is 0"
        )
    try:
        with safe_open(file, framework="numpy") as stream:
            names = json.loads((stream.metadata() or {})["predictions"])
            arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        if not isinstance(names, dict) or names.pop("format") != FORMAT:
            raise ValueError("another version of the format")
        root = names.pop("root")
        paths = None
        if "paths" in arrays:
            text = arrays.pop("paths").tobytes().decode("utf-8", "surrogateescape")
            paths = [root + line for line in text.split("\0")[:-1]]
        plain = {name: arrays[name] for name in ("labels", "top", "true", "rival", "logsumexp", "rows")}
        found = Predictions(
            **names,
            **plain,
            values=_below("value/", arrays),
            features=_below("feature/", arrays),
            logits=arrays.get("logits"),
            paths=paths,
        )
        _check(found)
        return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"Expected {file} to be the predictions of a run but got something else: {error}") from error


def _check(found: Predictions) -> None:
    """Raise a ValueError unless shapes, class numbers and names go together, as figures rely on."""
    for name in ("split", "main", "reference"):
        if not isinstance(getattr(found, name), str):
            raise ValueError(f"{name} is no text")
    for name in ("heads", "classnames"):
        texts = getattr(found, name)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} is no list of texts")
    heads, classes, count = len(found.heads), len(found.classnames), len(found.labels)
    shapes: dict[str, tuple[int, ...]] = {name: (heads, count) for name in ("true", "rival", "logsumexp")}
    shapes |= {"labels": (count,), "top": (heads, count, found.top.shape[-1])}
    for name, shape in shapes.items():
        if getattr(found, name).shape != shape:
            raise ValueError(f"{name} has the shape {getattr(found, name).shape} instead of {shape}")
    if found.logits is not None and found.logits.shape != (heads, count, classes):
        raise ValueError(f"logits have the shape {found.logits.shape}")
    if found.paths is not None and len(found.paths) != count:
        raise ValueError(f"there are {len(found.paths)} paths of {count} images")
    for name, below in (("labels", classes), ("top", classes), ("rows", count)):
        array = getattr(found, name)
        if (
            array.dtype.kind not in "iu"
            or array.ndim < 1
            or (array.size and not 0 <= array.min() <= array.max() < below)
        ):
            raise ValueError(f"{name} has other values than whole numbers from 0 to {below - 1}")
    for name, array in found.values.items():
        if len(array) != count:
            raise ValueError(f"value/{name} has {len(array)} rows")
    if any(len(array) != len(found.rows) for array in found.features.values()):
        raise ValueError("features have other rows than those listed")
