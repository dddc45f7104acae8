"""JCLIP-Adapter: bottlenecks on image and text features, and prompts by super-category.

The formulas are those of clip_adapter.py. Beside the usual results, the trainer draws curves and writes the five best
classes of each test image.

Legend: B images, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .clip import CLIP, fill_template, zeroshot_weights
from .clip_adapter import AdapterLearner
from .files import write_png, write_text

logger = logging.getLogger(__name__)
RESULT_CLASSES = 5  # classes of each image in result.txt


def parse_prompt_map(entries: Sequence[str]) -> dict[str, str]:
    """Parse "prefix=template" entries as {prefix: template}.

    Raises:
        ValueError: an entry is not of that form, or a prefix comes twice.
    """
    parsed: dict[str, str] = {}
    for entry in entries:
        prefix, equals, template = str(entry).partition("=")
        if not (prefix and equals) or prefix in parsed:
            raise ValueError(
                f"Expected DATASET.PROMPT_MAP to have entries 'prefix=template', each prefix once, but got {entry!r}"
            )
        fill_template(template, "")
        parsed[prefix] = template
    return parsed


def mapped_prompt(classname: str, prompt_map: dict[str, str], default: str) -> str:
    """Return the prompt of a class, by the template of the longest prefix of its name in the map.

    The rest of the name, after the prefix and the separator, goes into the template; where there is no rest, the whole
    name does. A name without a prefix in the map goes into the default template.
    """
    prefixes = [prefix for prefix in prompt_map if classname.startswith(prefix)]
    if not prefixes:
        return fill_template(default, classname)
    prefix = max(prefixes, key=len)
    return fill_template(prompt_map[prefix], classname[len(prefix) :].lstrip("_- ") or classname)


@dataclass(frozen=True)
class JCLIPAdapterConfig(MethodConfig):
    """Settings of JCLIP-Adapter."""

    views: int = kept_views(10)
    image_ratio: float = key(0.2, "a, share of the adapted image feature; 0: no adapter there", low=0, high=1)
    text_ratio: float = key(0.2, "b, share of the adapted text feature; 0: no adapter there", low=0, high=1)
    reduction: int = key(4, "E over the bottlenecks' width", low=1)
    final_relu: bool = key(False, "a second ReLU after each bottleneck, as in CLIP-Adapter's code")

    def check(self, path: str) -> None:
        """Check that at least one side has an adapter; see MethodConfig."""
        if not (self.image_ratio or self.text_ratio):
            raise ValueError(
                f"Expected {path}.IMAGE_RATIO or .TEXT_RATIO to be above 0 but got 0 for both: nothing would be learnt"
            )


@dataclass(frozen=True)
class PromptMapKeys:
    """Keys of DATASET for prompts by super-category."""

    prompt_map: tuple[str, ...] = key(
        (),
        "templates by super-category, 'prefix of the class name=template', such as "
        "('Animal=a photo of a {}, an animal.',)",
    )


@TRAINER_REGISTRY.register()
class JCLIPAdapter(FeatureTrainer):
    """Bottlenecks on image and text features, prompts by super-category, curves, and result.txt."""

    node_name = "JCLIPADAPTER"
    paper = "after Gao et al. 2021"
    learns = "bottlenecks on image and text features"
    config = JCLIPAdapterConfig
    extra_keys = {"DATASET": PromptMapKeys}
    model_name = "jclip"
    main_head = "jclip"
    drop_last = False
    _sums: tuple[float, float, int] = (0.0, 0.0, 0)  # loss, accuracy (each times images) and images of this epoch

    @classmethod
    def check_settings(cls, cfg: Any) -> None:
        """Check the settings, and the map of prompts; see CLIPTrainer."""
        super().check_settings(cfg)
        if parse_prompt_map(cfg.DATASET.PROMPT_MAP) and cls.read_prompts(cfg).sentences:
            raise ValueError("Expected DATASET.PROMPT_MAP or DATASET.DESCRIPTIONS to be empty but got both")

    def zeroshot(self, clip: CLIP, classnames: Sequence[str]) -> Tensor:
        """Return the weights [C, E] of the prompts by super-category, normalized."""
        prompt_map, weights = parse_prompt_map(self.cfg.DATASET.PROMPT_MAP), []
        if self.templates().sentences:
            return super().zeroshot(clip, classnames)
        for default in self.templates():
            prompts = [mapped_prompt(name, prompt_map, default) for name in classnames]
            weights.append(zeroshot_weights(clip, prompts, ["{}"]))
        return weights[0] if len(weights) == 1 else F.normalize(torch.stack(weights).mean(dim=0), dim=-1)

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the adapters of the image and the text side."""
        settings = self.settings
        return AdapterLearner(
            clip,
            classnames,
            zeroshot,
            image_ratio=settings.image_ratio,
            text_ratio=settings.text_ratio,
            reduction=settings.reduction,
            final_relu=settings.final_relu,
        )

    # Curves

    def forward_backward(self, batch: Any) -> dict[str, float]:
        """Make one step, and add its numbers to the sums for the curves; see FeatureTrainer."""
        summary = super().forward_backward(batch)
        n = len(batch["label"]) if self.stepped else 0
        earlier = self._sums if self.batch_idx else (0.0, 0.0, 0)
        if n:
            earlier = (earlier[0] + n * summary["loss"], earlier[1] + n * summary["acc"], earlier[2] + n)
        self._sums = earlier
        return summary

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Add a point to the curves."""
        loss, accuracy, n = self._sums
        point: dict[str, Any] = {"epoch": self.epoch + 1}
        if n:
            point["train"] = {"loss": loss / n, "accuracy": accuracy / n}
        if self.val_loader is not None:
            self.set_model_mode("eval")
            known = self.val_loader.all()
            logits = self.network(known.values[0])
            correct = (logits.argmax(dim=1) == known.labels).float().mean()
            point["val"] = {"loss": float(F.cross_entropy(logits, known.labels)), "accuracy": 100.0 * float(correct)}
            for name, value in point["val"].items():
                self.write_scalar(f"val/{name}_per_epoch", value, self.epoch)
        if self.writes_files:
            earlier = [p for p in self._read_curves() if p["epoch"] <= self.epoch]  # of the run that this one continues
            write_text(self._file("curves.json"), json.dumps([*earlier, point], indent=1))
        super().after_epoch()

    def after_train(self) -> None:
        """Draw the curves, and test."""
        curves = self._read_curves() if self.writes_files else []
        if curves:
            draw_curves(curves, self._file("curves.png"))
        super().after_train()

    def _file(self, name: str) -> str:
        return os.path.join(self.output_dir, name)

    def _read_curves(self) -> list[dict[str, Any]]:
        try:
            with open(self._file("curves.json"), encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return []

    # What the toolbox saves of a run, so that the run can be resumed within an epoch

    def run_state(self) -> dict[str, Any]:
        """Return the sums of this epoch."""
        return {"sums": self._sums}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Put the sums that `run_state` returned back."""
        self._sums = tuple(state["sums"])

    # result.txt

    def test(self, split: str | None = None) -> float:
        """Evaluate a split; after the test set, also write result.txt: each image's file and its best classes."""
        result = super().test(split)
        if (split or self.cfg.TEST.SPLIT) == "test" and self.writes_files:
            self.write_result(self._file("result.txt"))
        return result

    @torch.no_grad()
    def write_result(self, path: str) -> None:
        """Write one line per test image: file name and the numbers of its five best classes, best first."""
        self.set_model_mode("eval")
        lines = []
        for batch in self.test_loader:
            features, _ = self.parse_batch_test(batch)
            lines += result_lines(batch["impath"], self.network(features))
        write_text(path, "".join(f"{line}\n" for line in lines))
        logger.info("The five best classes of each test image, by number: %s", path)


def file_name(path: str) -> str:
    """Return the name of a file as one printable line, whatever characters it contains."""
    name = os.path.basename(path)
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in name).split())


def result_lines(paths: Sequence[str], logits: Tensor) -> list[str]:
    """Return a line for each image: its file name and the numbers of its (at most) five best classes.

    The best class comes first; classes of equal logits stay in order.
    """
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :RESULT_CLASSES].tolist()
    return [" ".join([file_name(path), *map(str, classes)]) for path, classes in zip(paths, order, strict=True)]


def draw_curves(curves: Sequence[dict[str, Any]], path: str) -> None:
    """Draw loss and accuracy by epoch, of training and validation images, as a PNG."""
    figure = Figure(figsize=(9, 3.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("", ", %"), strict=True):
        for split in ("train", "val"):
            points = [(p["epoch"], p[split][name]) for p in curves if split in p]
            if points:
                axes.plot(*zip(*points, strict=True), label=split)
        axes.set(xlabel="epoch", ylabel=name + unit)
        axes.legend()
    write_png(path, figure)
