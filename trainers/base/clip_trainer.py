"""Set up a trainer on a frozen CLIP: precision, prompts, the model's step, and the report of several heads.

This module uses only what upstream Dassl offers. What the toolbox of this project offers beyond that (mixed precision
with gradient scaling, evaluation of several heads in one pass) is used where it is there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dassl.engine import TrainerX

from ..clip import CLIP, DEFAULT_TEMPLATE, check_backbone, load_clip, tell_preprocessing, templates_for
from ..configs import without_config
from .checks import check_number

logger = logging.getLogger(__name__)
PRECISIONS = ("fp32", "fp16", "amp", "bf16")


class CLIPTrainer(TrainerX):
    """A trainer on a frozen CLIP: set-up, and the report of its heads. Its keys lie in the node TRAINER.<node_name>.

    What the engine may ask for beside the usual methods: `model_heads`, `main_head`, `reference_head`, `selected`.
    """

    recipe = 1  # raised when the same settings give other numbers than before; the engine then tells runs apart
    node_name = ""
    main_head = ""
    reference_head = "clip"
    of_each_class = ""  # what each class trained on has of its own, so that no other can be classified; "": nothing
    # Prompts of zero-shot CLIP, the head `clip`, on ImageNet and its shifted test sets, unless DATASET.TEMPLATE is set.
    imagenet_templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)
    # Whether an epoch leaves out its last, smaller batch, as the method's source does. On upstream Dassl, loaders of
    # images always do.
    drop_last = True
    adapters = "none"  # whether features are corrected by MODEL.IMO_WEIGHTS: none (refused) | optional | needed

    @property
    def _own_toolbox(self) -> bool:
        """Whether the engine handles precision (and several heads) itself."""
        return callable(getattr(self, "set_precision", None))

    # Configuration

    def check_clip_cfg(self, cfg: Any) -> None:
        """Checks the keys that concern CLIP, before data and CLIP are loaded; the node itself is checked before.

        Raises:
            ValueError: a key that is missing or wrong, or a backbone that does not exist.
            FileNotFoundError: the backbone's weights are not there.
        """
        if "WEIGHTS" not in cfg.MODEL.BACKBONE or "TEMPLATE" not in cfg.DATASET:
            raise ValueError(
                "Expected the configuration to have MODEL.BACKBONE.WEIGHTS and DATASET.TEMPLATE: call extend_cfg(cfg)"
            )
        if cfg.TRAINER[self.node_name].PREC == "fp16" and not self._own_toolbox:
            raise ValueError(
                f"Expected TRAINER.{self.node_name}.PREC to be fp32, amp or bf16 but got fp16: "
                "this toolbox cannot scale gradients, which half precision needs"
            )
        if cfg.MODEL.get("IMO_WEIGHTS", "") and self.adapters == "none":
            raise ValueError(
                f"Expected MODEL.IMO_WEIGHTS to be '' for {type(self).__name__}, which uses no corrected features, "
                f"but got {cfg.MODEL.IMO_WEIGHTS!r}"
            )
        if not cfg.MODEL.BACKBONE.NAME:
            raise ValueError(without_config(cfg.TRAINER.NAME))
        templates_for(cfg.DATASET.NAME, cfg.DATASET.TEMPLATE, self.imagenet_templates)
        check_number(cfg, "FEATURE_CACHE.LIMIT", 0, 1e6)
        check_backbone(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS or None)

    @classmethod
    def memory_advice(cls, cfg: Any) -> list[str]:
        """Settings that make a run need less memory than `cfg` does, for an engine that asks."""
        node, name = cfg.TRAINER.get(cls.node_name, {}), f"TRAINER.{cls.node_name}"
        advice = []
        if "TEXT_CHUNK" in node:
            smaller = max(1, node.TEXT_CHUNK // 2) if node.TEXT_CHUNK else 32
            advice.append(f"{name}.TEXT_CHUNK {smaller}")
        if node.get("CHECKPOINTING") is False:
            advice.append(f"{name}.CHECKPOINTING True")
        if node.get("PREC") == "fp32":
            advice.append(f"{name}.PREC amp")
        return advice

    # Building

    def templates(self) -> list[str]:
        """Prompt templates of zero-shot CLIP."""
        return templates_for(self.cfg.DATASET.NAME, self.cfg.DATASET.TEMPLATE, self.imagenet_templates)

    def load_frozen_clip(self, prec: str) -> tuple[CLIP, list[str]]:
        """The frozen CLIP that the configuration names, and the class names; the precision is set up too.

        Raises:
            ValueError: labels and class names, or image size and CLIP, do not fit.
        """
        cfg = self.cfg
        classnames = list(self.dm.dataset.classnames)
        if len(classnames) != self.num_classes:
            raise ValueError(
                f"Expected labels 0 to {len(classnames) - 1} for the {len(classnames)} class names of the training "
                f"images but got labels up to {self.num_classes - 1}"
            )
        self._set_up_precision(prec)
        logger.info("Loading CLIP (backbone: %s)", cfg.MODEL.BACKBONE.NAME)
        # Without CUDA, fp16 autocasts to bfloat16: the backbone is then kept in bfloat16 too.
        precision = "bf16" if prec == "fp16" and self.device.type != "cuda" else prec
        clip = load_clip(
            cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS or None, precision=precision, device=self.device
        )
        tell_preprocessing(cfg)
        logger.info("Prompts of zero-shot CLIP: %s", " | ".join(self.templates()))
        size = (clip.image_size, clip.image_size)
        if tuple(cfg.INPUT.SIZE) != size:
            raise ValueError(f"Expected INPUT.SIZE to be {size} for {clip.name} but got {tuple(cfg.INPUT.SIZE)}")
        return clip, classnames

    def _set_up_precision(self, prec: str) -> None:
        """`self._autocast` = a function that gives the context in which the forward pass runs."""
        self._autocast: Any = contextlib.nullcontext
        if self._own_toolbox:
            self.set_precision(prec)
            self._autocast = self.precision.autocast
        elif prec == "amp":
            logger.info("This toolbox cannot scale gradients: amp means bfloat16 here, which needs no scaling")
            self._autocast = lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)

    def in_order(self, images: Dataset[Any]) -> DataLoader[Any]:
        """A loader of these images, one after the other, otherwise as the test loader."""
        return DataLoader(
            images,
            batch_size=self.cfg.DATALOADER.TEST.BATCH_SIZE,
            num_workers=getattr(self.dm.test_loader, "num_workers", 0),
            worker_init_fn=getattr(self.dm.test_loader, "worker_init_fn", None),
            pin_memory=getattr(self.dm.test_loader, "pin_memory", False),
            generator=torch.Generator(),  # of the workers; the program's own draws do not depend on what is cached
        )

    # One step

    def after_update(self) -> None:
        """Move what follows the model from step to step, now that a step was made; a step left out never gets here."""

    def model_update(self, names: Any = None) -> bool:
        """Step the optimisers, call `after_update` where the step was made, and return (and keep) whether it was."""
        counted = super().model_update(names)
        if not self._own_toolbox:  # upstream makes every step: it stops at a loss that is not finite
            counted = self.stepped = True
            self.after_update()
        return counted

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """-> images [B, 3, H, W] and labels [B], on the device."""
        images, labels = batch["img"], batch["label"]
        # From pinned memory the copy goes on while the program does.
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def no_validation(self) -> str:
        """Why there is nothing to choose on, or "". Test images that a reader hands out as validation do not count."""
        val, test = self.dm.dataset.val, self.dm.dataset.test
        if self.val_loader is None or not val:
            return "no validation set"
        if str(getattr(self.cfg.DATASET, "VAL", "")).lower() == "coop":
            return "DATASET.VAL is coop: the validation images are test images"
        tested = {item.impath for item in test or ()}
        if any(item.impath in tested for item in val):
            return "validation images are test images"
        return ""

    # Evaluation

    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] -> logits [B, C] of all heads."""
        raise NotImplementedError

    def model_inference(self, input: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, C] of the main head."""
        return self.model_heads(input)[self.main_head]

    def test(self, split: str | None = None) -> float:
        """Evaluates a split; an engine that knows one head only is followed by a pass that reports all."""
        result = super().test(split)
        if not self._own_toolbox:
            self._report_heads(split or self.cfg.TEST.SPLIT)
        return result

    @torch.no_grad()
    def _report_heads(self, split: str) -> None:
        use_val = split == "val" and self.val_loader is not None
        heads, labels = self._collect(self.val_loader if use_val else self.test_loader)
        for head, logits in heads.items():
            accuracy = 100.0 * (logits.argmax(dim=1) == labels).float().mean().item()
            logger.info("* head %s: accuracy %.2f%%", head, accuracy)
            self.write_scalar(f"{'val' if use_val else 'test'}/{head}/accuracy", accuracy, self.epoch)

    @torch.no_grad()
    def _collect(self, loader: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Logits of all heads [n, C] and labels [n] of all images of a loader, on the CPU."""
        self.set_model_mode("eval")
        batches, labels = [], []
        for batch in loader:
            images, label = self.parse_batch_test(batch)
            batches.append({head: logits.cpu() for head, logits in self.model_heads(images).items()})
            labels.append(label.cpu())
        return {head: torch.cat([batch[head] for batch in batches]) for head in batches[0]}, torch.cat(labels)
