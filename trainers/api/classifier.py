"""FewShotClassifier: the project's methods as one Python object, with scikit-learn's conventions.

    from dlr_clip import FewShotClassifier

    clf = FewShotClassifier(backbone="ViT-B/32").fit(paths, labels)  # or .fit("folder with a folder for each class")
    clf.predict(["new.jpg"])
    clf.save("model.safetensors")

It is thin over the trainers, transforms and predictions of train.py and predict.py: the same seed gives the same
numbers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor
from torch.nn import functional as F

from dassl.utils import InputError, atomic_write

from ..app.configuration import check_method
from ..app.prediction import infer, main_head, read_batches
from ..clip.load import shared_clips
from ..features import remembered_features
from .export import ExportReport, export_classifier
from .fitting import Fitting, fit
from .given import all_paths, folder_of, items_of
from .images import list_images
from .inspect_page import Page
from .inspecting import photos_below
from .inspection import Findings, Photo, inspect_photos
from .model_file import load_file, save_file
from .report import Report
from .runs import VALIDATION_SHARE, Choice, Runner, apart, wrong_input_told

AUTO = "auto"


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify images after a few labeled examples of each class, on a frozen CLIP.

    Args:
        method: "auto" (chosen by cross-validation, see `report()`), or the name of a registered trainer.
        backbone: a name that MODEL.BACKBONE.NAME takes: "ViT-B/32", "RN50", "tiny", "open_clip:...".
        config: short name of the method's configuration, or a YAML file; None: the one that fits the backbone.
        weights: a local file of the backbone's weights; None: those of the cache, or downloaded once.
        settings: further keys of the configuration and their values, such as {"OPTIM.MAX_EPOCH": 20}.
        class_names: label -> name that CLIP reads; None: the labels are the names.
        validation_fraction: share of the training images that settings are chosen on, where a class has four or more.
        calibration: "auto": a temperature is fitted on held-out images, so that probabilities mean what they say; None:
            it is not, and a method that is named is not cross-validated.
        unknown: None: every image gets a class; "auto": `predict` answers None for images whose highest probability is
            below a threshold, which is found by leaving classes out; or the threshold.
        time_limit: seconds for "auto" to try methods that train within the encoders, too; None: it does not.
        device: "auto", "cpu" or "cuda".
        precision: "auto": fp32 without a GPU, else the method's own; or fp32, fp16, bf16, amp.
        seed: decides everything random.
        output_dir: folder for the files that train.py writes (checkpoints, TensorBoard, ...); None: none are written.
        verbose: whether to show what train.py shows.

    Attributes:
        classes_: [C], the labels in the order of the columns of `predict_proba`.
        class_names_: the names that CLIP reads.
        method_, config_: what is used, also where "auto" has chosen it.
        temperature_: what logits are divided by.
        threshold_: of `unknown`; None: every image gets a class.
        n_images_: label -> number of images given.
    """

    def __init__(
        self,
        method: str = AUTO,
        backbone: str = "ViT-B/32",
        *,
        config: str | None = None,
        weights: str | None = None,
        settings: Mapping[str, Any] | None = None,
        class_names: Mapping[Any, str] | None = None,
        validation_fraction: float = VALIDATION_SHARE,
        calibration: str | None = "auto",
        unknown: str | float | None = None,
        time_limit: float | None = None,
        device: str = "auto",
        precision: str = "auto",
        seed: int = 1,
        output_dir: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.method = method
        self.backbone = backbone
        self.config = config
        self.weights = weights
        self.settings = settings
        self.class_names = class_names
        self.validation_fraction = validation_fraction
        self.calibration = calibration
        self.unknown = unknown
        self.time_limit = time_limit
        self.device = device
        self.precision = precision
        self.seed = seed
        self.output_dir = output_dir
        self.verbose = verbose

    # ------------------------------------------------------------------------------------------------ learning

    def fit(self, X: Any, y: Any = None) -> FewShotClassifier:
        """Learn from images.

        Args:
            X: a list of paths, PIL images, arrays or tensors (see `list_images`), with y; or the path of a folder with
                a folder for each class, or of a CSV file with the columns path and label. Such a folder may say what is
                train, val and test; a test part is measured on and not learnt from.
            y: a label for each image; None where X is a folder or a CSV file.

        Raises:
            InputError: images, labels or settings are wrong; the message says what was expected and what came.
        """
        self._check_params()
        with tempfile.TemporaryDirectory(prefix="dlr_clip_") as temporary:
            folder, items, classes = "", None, np.empty(0)
            if y is None:
                folder = folder_of(X)
            else:
                items, classes = items_of(X, y, self.class_names or {}, Path(temporary))
            runner = self._runner(temporary_images=items is not None and not all_paths(X))
            choice = None if self.method == AUTO else Choice(self.method, self.config or "")
            with apart(self.seed, self.verbose), wrong_input_told(), shared_clips(), remembered_features():
                found = fit(
                    runner, choice, items, folder, self.output_dir or temporary, self.validation_fraction,
                    files=self.output_dir is not None, calibrate=self.calibration == AUTO,
                    unknown=self.unknown == AUTO, time_limit=self.time_limit,
                )  # fmt: skip
        self._adopt(found, classes if items is not None else np.array(found.class_names))
        if isinstance(self.unknown, float | int) and not isinstance(self.unknown, bool):
            self.threshold_ = float(self.unknown)
        return self

    def _check_params(self) -> None:
        if self.method != AUTO:
            check_method(self.method, 'method ("auto" chooses one)')
        elif self.config is not None:
            raise InputError(f'Expected no config with method "auto", which chooses one, but got {self.config!r}')
        for name, allowed in (("calibration", (AUTO, None)), ("device", (AUTO, "cpu", "cuda"))):
            if getattr(self, name) not in allowed:
                shown = ", ".join(map(repr, allowed))
                raise InputError(f"Expected {name} to be one of {shown} but got {getattr(self, name)!r}")
        share, unknown = self.validation_fraction, self.unknown
        if not isinstance(share, float | int) or not 0 <= share < 1:
            raise InputError(f"Expected validation_fraction to be at least 0 and below 1 but got {share!r}")
        if unknown not in (None, AUTO) and not (isinstance(unknown, float | int) and 0 <= unknown <= 1):
            raise InputError(f'Expected unknown to be None, "auto" or a threshold from 0 to 1 but got {unknown!r}')
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"Expected seed to be a whole number, at least 0, but got {self.seed!r}")

    def _runner(self, temporary_images: bool = False) -> Runner:
        pairs = dict(self.settings or {})
        if temporary_images:  # their files are gone afterwards, and would only fill the cache of features
            pairs["FEATURE_CACHE.USE"] = False
        return Runner(
            self.backbone, self.weights or "", self.seed, self.device, self.precision, tuple(pairs.items()),
            self.verbose,
        )  # fmt: skip

    _trainer: Any
    _report: Report
    _photos: list[Photo]
    _held_out: dict[str, Tensor]
    threshold_: float | None

    def _adopt(self, found: Fitting, classes: np.ndarray[Any, Any]) -> None:
        self.classes_ = classes
        self.class_names_ = list(found.class_names)
        self.method_, self.config_ = found.choice.method, found.config
        self.temperature_ = found.temperature
        self.threshold_ = found.threshold
        self.n_images_ = {
            label: found.counts.get(place, 0) for place, label in enumerate(classes.tolist()) if found.counts
        }
        self._trainer, self._report = found.trainer, found.report
        self._photos, self._held_out = found.photos, found.held_out

    # --------------------------------------------------------------------------------------------- predicting

    def predict(self, X: Any) -> np.ndarray[Any, Any]:
        """Return the class of each image, [N]; None for an image of no known class, where `unknown` asks for that."""
        probabilities = self.predict_proba(X)
        answers = self.classes_[probabilities.argmax(axis=1)]
        if self.threshold_ is None:
            return answers
        answers = answers.astype(object)
        answers[probabilities.max(axis=1) < self.threshold_] = None
        return answers

    def predict_proba(self, X: Any) -> np.ndarray[Any, Any]:
        """Return the probability of each class for each image, [N, C]; the columns are those of `classes_`."""
        return (self._logits(X).double() / self.temperature_).softmax(dim=1).numpy()

    def decision_function(self, X: Any) -> np.ndarray[Any, Any]:
        """Return the logits of each class for each image, [N, C], before the temperature."""
        return self._logits(X).numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy, from 0 to 1; an image that is answered by None counts as wrong."""
        answers, labels = self.predict(X), np.asarray(y)
        if labels.shape != answers.shape:
            raise InputError(f"Expected a label for each of {len(answers)} images but got y of shape {labels.shape}")
        right = [ours == theirs for ours, theirs in zip(answers, labels, strict=True)]
        return float(np.average(right, weights=sample_weight))

    def top_k(self, X: Any, k: int = 5) -> list[list[tuple[Any, float]]]:
        """Return the k best classes of each image with their probabilities, the best first."""
        if not isinstance(k, int) or k < 1:
            raise InputError(f"Expected k to be at least 1 but got {k!r}")
        probabilities = self.predict_proba(X)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
        labels = self.classes_.tolist()
        return [[(labels[c], float(row[c])) for c in best] for row, best in zip(probabilities, order, strict=True)]

    def embed(self, X: Any) -> np.ndarray[Any, Any]:
        """Return CLIP's features of each image, [N, E], of length 1: those of the frozen CLIP, without the method."""
        trainer = self._fitted()
        clip = trainer.network.clip
        rows = self._collect(X, lambda images, paths: F.normalize(clip.encode_image(images).float(), dim=-1))
        return rows.numpy()

    def _fitted(self) -> Any:
        if not hasattr(self, "_trainer"):
            raise NotFittedError("This FewShotClassifier is not fitted yet: call fit, or FewShotClassifier.load")
        return self._trainer

    def _logits(self, X: Any) -> Tensor:
        trainer = self._fitted()

        def logits(images: Tensor, paths: Sequence[str]) -> Tensor:
            heads = infer(trainer, images, paths)
            return heads[main_head(trainer, heads)]

        return self._collect(X, logits)

    @torch.no_grad()
    def _collect(self, X: Any, compute: Any) -> Tensor:
        """Return what `compute` gives for batches of the images, [N, ...], on the CPU.

        Raises:
            InputError: there are no images, or some cannot be read.
        """
        trainer, sources = self._fitted(), list_images(X)
        if not sources:
            raise InputError("Expected images but got none")
        paths = [source if isinstance(source, str) else "" for source in sources]
        rows, unreadable = [], {}
        with apart(self.seed, self.verbose):
            for good, bad in read_batches(trainer, sources, bar=self.verbose):
                unreadable.update(bad)
                if good and not unreadable:
                    images = torch.stack([image for _, image in good]).to(trainer.device)
                    rows.append(compute(images, [paths[number] for number, _ in good]).float().cpu())
        if unreadable:
            number, reason = next(iter(unreadable.items()))
            more = f" (and {len(unreadable) - 1} others)" if len(unreadable) > 1 else ""
            raise InputError(f"{reason}, X[{number}]{more}")
        return torch.cat(rows)

    # ------------------------------------------------------------------------------------- what was found, files

    def report(self) -> Report:
        """Return what was found while fitting: the choice, the accuracy to expect, calibration, unknown images."""
        self._fitted()
        return self._report

    def inspect(
        self, images: str | os.PathLike[str] | None = None, *, file: str | os.PathLike[str] | None = None
    ) -> Findings:
        """Find what is wrong with photos: mistakes, doubtful labels, near-duplicates, broken and tiny files.

        Args:
            images: a folder with a folder for each class, or a CSV file; None: the photos of `fit`, which have to be
                where they were.
            file: an HTML page to write, with thumbnails; None: none.

        Raises:
            InputError: there are no photos, or they have classes that were not learnt.
        """
        trainer = self._fitted()
        photos = self._photos if images is None else photos_below(images, self.class_names_)
        if images is None and not all(os.path.exists(photo.path) for photo in photos[:1]):
            raise InputError(
                "Expected the photos of fit in files but they were given as images: save them, and name the folder"
            )
        with apart(self.seed, self.verbose):
            held_out = self._held_out if images is None else {}
            found = inspect_photos(trainer, photos, held_out, self.temperature_)
        if file is not None:
            with atomic_write(file) as stream:
                stream.write(
                    Page(found, "Photos of the classifier" if images is None else f"Photos of {images}").html()
                )
        return found

    def save(self, file: str | os.PathLike[str]) -> None:
        """Save the classifier as one safetensors file: weights, and the rest as JSON in its header; no pickle.

        The backbone's weights are not in it. Its name and its digest are.

        Raises:
            InputError: the classifier cannot be told by such a file, or the file cannot be written.
        """
        self._fitted()
        save_file(self, file)

    def export(self, file: str | os.PathLike[str], format: str = "onnx", **options: Any) -> ExportReport:
        """Export the classifier for programs without this project; return what was measured of the file.

        Args:
            file: what to write; for openclip and peft a folder.
            format: "onnx", "torchscript", "openclip" or "peft".
            options: images, with_preprocessing, half, int8; see `export_classifier`.

        Raises:
            InputError: the method has no such format, or something else that is given is wrong.
            ExportError: the file gives other probabilities than the classifier; nothing is kept.
        """
        self._fitted()
        return export_classifier(self, file, format=format, **options)

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], *, weights: str | None = None, device: str = "auto", verbose: bool = False
    ) -> FewShotClassifier:
        """Load a classifier that `save` has written.

        Args:
            file: the file.
            weights: a local file of the backbone's weights; None: those of the cache, or downloaded once.
            device, verbose: see FewShotClassifier.

        Raises:
            InputError: the file is something else, or was made for other weights of the backbone.
        """
        return load_file(cls, file, weights, device, verbose)

    @classmethod
    def from_run(
        cls, folder: str | os.PathLike[str], *, device: str = "auto", verbose: bool = False
    ) -> FewShotClassifier:
        """Make a classifier of a finished run of train.py.

        Raises:
            InputError: the folder is not that of a finished run.
        """
        from .model_file import from_run

        return from_run(cls, folder, device, verbose)

    def __sklearn_is_fitted__(self) -> bool:
        """Say whether `fit` or `load` has been called."""
        return hasattr(self, "_trainer")

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that X is a list of images, not a table of numbers."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.no_validation = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled once fitted: `save` writes a file that holds no code."""
        if hasattr(self, "_trainer"):
            raise TypeError("Expected FewShotClassifier.save(file) for a fitted classifier but got pickle")
        state: dict[str, Any] = super().__getstate__()
        return state
