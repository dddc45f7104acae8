"""What the trainers share: CLIP and precision from the configuration, schedules per step, reports, checkpoints.

It uses only what upstream Dassl offers; what the toolbox of this project offers beyond that (mixed precision with
gradient scaling, evaluation of several heads in one pass) is used where it is there and done without where it is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import os.path as osp
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dassl.engine import TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint

from .clip import CLIP, DEFAULT_TEMPLATE, check_backbone, load_clip, tell_preprocessing, templates_for
from .configs import without_config
from .learner import Classifier

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


class LearnerTrainer(CLIPTrainer):
    """A trainer whose `network` has a `learner`: what is trained or fitted, and saved in the folder `model_name`."""

    network: Any
    model_name = ""

    # Configuration

    def check_cfg(self, cfg: Any) -> None:
        """Checks all that can be checked before data and CLIP are loaded.

        Raises:
            ValueError: a wrong key in the trainer's node, or a backbone that does not exist.
            FileNotFoundError: the backbone's weights are not there.
        """
        name = self.node_name
        if name not in cfg.TRAINER:
            raise ValueError(f"Expected the configuration to have a node TRAINER.{name} but got none: call extend_cfg")
        check_choice(cfg, f"TRAINER.{name}.PREC", PRECISIONS)
        self.check_node(cfg)
        self.check_clip_cfg(cfg)

    def check_node(self, cfg: Any) -> None:
        """Checks the keys of the trainer's node but PREC."""

    # Checkpoints

    def load_model(self, directory: str | os.PathLike[str], epoch: int | None = None) -> None:
        """Loads what an earlier run learnt; its dataset may be another one.

        Args:
            directory: output folder of that run; empty: nothing is loaded.
            epoch: the checkpoint after that many epochs; None: the best one, or the latest where none was called best.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: it was made by something else, for another CLIP or for other classes.
        """
        if not directory:
            logger.info("load_model() is skipped: no model folder is given")
            return
        method = type(self).__name__
        path = checkpoint_path(directory, self.model_name, epoch, method)
        checkpoint = load_checkpoint(path)
        state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
        if not isinstance(state, Mapping):
            raise ValueError(f"Expected a checkpoint of {method} but got something else: {path}")
        try:
            self.network.learner.take(state, getattr(self.dm.dataset, "class_indices", None))
        except ValueError as error:
            raise ValueError(f"{error}: {path}") from error
        self.selected = dict((checkpoint.get("engine") or {}).get("selected", {}))
        logger.info("Loaded %s (epoch %s)", path, checkpoint.get("epoch"))


class EncoderTrainer(LearnerTrainer):
    """Trains a `Classifier` by cross-entropy; a subclass says which, and what its configuration is.

    The schedule counts epochs (as CoOp's), unless `per_step`.
    """

    network: Classifier
    per_step = False

    # Building

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> Classifier:
        """The classifier to train."""
        raise NotImplementedError

    def build_model(self) -> None:
        """CLIP, the classifier around it, and the optimiser of what is learnt."""
        cfg = self.cfg
        clip, classnames = self.load_frozen_clip(cfg.TRAINER[self.node_name].PREC)
        self.network = self.build_network(clip, classnames, self.templates())
        learner = self.network.learner
        count = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        logger.info("Parameters to learn: %s", f"{count:,}")
        optim = self.build_optimiser(learner)
        self.register_model(self.model_name, learner, optim, self.build_schedule(optim))

    def build_optimiser(self, learner: Any) -> Any:
        """The optimiser of what is learnt."""
        return build_optimizer(learner, self.cfg.OPTIM)

    def build_schedule(self, optim: Any) -> Any:
        """The schedule of the learning rate."""
        node = self.cfg.OPTIM
        return build_lr_scheduler(optim, count_steps(node, len(self.train_loader_x)) if self.per_step else node)

    # One step

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """One step -> loss and accuracy (percent)."""
        images, labels = self.parse_batch_train(batch)
        with self._autocast():
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels)
        numbers = sent([loss, compute_accuracy(logits.detach(), labels)[0].squeeze()])
        self.model_backward_and_update(loss)
        if self.per_step or self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        loss_value, accuracy = numbers()
        return {"loss": loss_value, "acc": accuracy}

    # Evaluation

    @torch.no_grad()
    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] -> logits [B, C] of zero-shot CLIP and of the method."""
        with self._autocast():
            clip_logits, logits = self.network.both(input)
        return {self.reference_head: clip_logits, self.main_head: logits}


def sent(values: Sequence[Tensor]) -> Callable[[], list[float]]:
    """Send one-element tensors to the program, and return what gives their values.

    On a GPU the copy waits its turn and the program goes on. Sent before the backward pass and asked for after the
    step, they are there: the step has waited for its gradients in between.
    """
    numbers = torch.stack([value.detach().float() for value in values]).to("cpu", non_blocking=True)
    if values[0].device.type != "cuda":
        return numbers.tolist
    there = torch.cuda.Event()
    there.record()

    def read() -> list[float]:
        there.synchronize()
        return numbers.tolist()

    return read


def build_optimizer_with_eps(model: nn.Module, optim_cfg: Any, eps: float) -> Any:
    """The optimiser that `optim_cfg` describes, with this epsilon where its kind has one."""
    optim = build_optimizer(model, optim_cfg)
    for group in optim.param_groups:
        if "eps" in group:
            group["eps"] = eps
    return optim


def count_steps(optim_cfg: Any, num_batches: int) -> Any:
    """A copy of the node OPTIM in which everything that counts epochs counts steps."""
    node = optim_cfg.clone()
    node.defrost()
    node.MAX_EPOCH = optim_cfg.MAX_EPOCH * num_batches
    if optim_cfg.get("LR_UNIT", "epoch") == "epoch":  # else the others count steps already
        node.WARMUP_EPOCH = optim_cfg.WARMUP_EPOCH * num_batches
        if isinstance(optim_cfg.STEPSIZE, (list, tuple)):
            node.STEPSIZE = type(optim_cfg.STEPSIZE)(size * num_batches for size in optim_cfg.STEPSIZE)
    node.freeze()
    return node


def checkpoint_path(directory: str | os.PathLike[str], model_name: str, epoch: int | None, method: str) -> str:
    """The file of a checkpoint: of that epoch, or (None) the best one, or the latest where none was called best.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = osp.join(directory, model_name)
    if epoch is not None:
        name = f"model.pth.tar-{epoch}"
    else:
        name, pointer = "model-best.pth.tar", osp.join(folder, "checkpoint")
        if not osp.exists(osp.join(folder, name)):
            if not osp.exists(pointer):
                raise FileNotFoundError(f"Expected a checkpoint of {method} in {folder} but there is none")
            with open(pointer, encoding="utf-8") as file:
                name = osp.basename(file.readline().strip()) or name
    path = osp.join(folder, name)
    if not osp.exists(path):
        raise FileNotFoundError(f"Expected a checkpoint at {path} but there is none")
    return path


# Checks of configuration values


def _value(cfg: Any, path: str) -> Any:
    for key in path.split("."):
        cfg = cfg[key]
    return cfg


def check_choice(cfg: Any, path: str, choices: Sequence[str]) -> None:
    """ValueError unless the key at `path` is one of `choices`."""
    value = _value(cfg, path)
    if value not in choices:
        raise ValueError(f"Expected {path} to be one of {', '.join(choices)} but got {value!r}")


def check_bool(cfg: Any, path: str) -> None:
    """ValueError unless the key at `path` is True or False."""
    value = _value(cfg, path)
    if not isinstance(value, bool):
        raise ValueError(f"Expected {path} to be True or False but got {value!r}")


def check_whole(cfg: Any, path: str, low: int = 1) -> None:
    """ValueError unless the key at `path` is a whole number of at least `low`."""
    value = _value(cfg, path)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"Expected {path} to be a whole number, at least {low}, but got {value!r}")


def check_number(cfg: Any, path: str, low: float, high: float, *, open_low: bool = False) -> None:
    """ValueError unless the key at `path` is a finite number in [low, high] (`open_low`: above low)."""
    value = _value(cfg, path)
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not low <= value <= high or (open_low and value == low) or abs(value) == float("inf"):
        bounds = f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise ValueError(f"Expected {path} to be a number, {bounds}, but got {value!r}")


def check_words(cfg: Any, path: str) -> None:
    """ValueError unless the key at `path` is text without a placeholder; it may be empty."""
    value = _value(cfg, path)
    if not isinstance(value, str) or "{" in value:
        raise ValueError(f"Expected {path} to be words such as 'a photo of a', or '', but got {value!r}")
