"""Set up a trainer on a frozen CLIP: settings, precision, prompts, and the heads that are reported.

CLIPTrainer derives from PortableTrainer (../portable.py), so that it also runs on upstream Dassl.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dassl.data import DatasetWrapper
from dassl.data.transforms import build_transform
from dassl.metrics import compute_accuracy

from ..clip import (
    CLIP,
    DEFAULT_TEMPLATE,
    Prompts,
    check_backbone,
    load_clip,
    read_descriptions,
    sentences_of,
    tell_preprocessing,
    templates_for,
    zeroshot_weights,
)
from ..configs import without_config
from ..features.encoder import ImageEncoder
from ..features.loaders import workers_like
from ..log import DETAIL
from ..portable import OWN_TOOLBOX, PortableTrainer
from .blocks_needed import BlocksNeeded
from .keys import MethodConfig, add_keys, check_number, has_keys, read_keys
from .label_check import LabelCheck, LabelCheckKeys, asks_for_check, check_labels
from .losses import LossKeys, balanced_weights, check_plain_loss, class_loss, total
from .transfers import sent

logger = logging.getLogger(__name__)
SHARED_KEYS: tuple[tuple[str, type], ...] = (("OPTIM", LossKeys), ("DATASET", LabelCheckKeys))  # of every method


class CLIPTrainer(BlocksNeeded, PortableTrainer):
    """Train a method on a frozen CLIP, and report its heads. The method's keys lie in the node TRAINER.<node_name>.

    See dassl/engine/declared.py for what the engine asks of a trainer.
    """

    config: type[MethodConfig] = MethodConfig  # the keys of the method's node
    extra_keys: dict[str, type] = {}  # keys that the method adds to other sections: "INPUT" -> a dataclass of keys
    recipe = 1  # raise it when the same settings give other numbers than before; the engine then tells runs apart
    paper = ""  # who has published the method, and when
    learns = ""  # what is trained or fitted
    node_name = ""  # key below TRAINER; "": the class's name in upper case
    model_name = ""  # folder of the checkpoints; "": the class's name in lower case
    main_head = ""  # head that is the method's accuracy; "": as model_name
    reference_head = "clip"
    # What the method learns or keeps separately for each training class, so that no other class can be classified:
    # "weights", say; "": nothing.
    of_each_class = ""
    # Prompts of zero-shot CLIP, the head `clip`, on ImageNet and its shifted test sets, unless DATASET.TEMPLATE is set.
    imagenet_templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)
    # Whether an epoch leaves out its last, smaller batch, as its source does (image loaders of upstream always do).
    drop_last = True
    cross_entropy = True  # whether OPTIM.LOSS may put another loss in the place of cross-entropy
    weighs_classes = False  # whether OPTIM.CLASS_WEIGHTS is followed although OPTIM.LOSS is not
    per_step = False  # True: the learning-rate schedule counts steps; False: it counts epochs, as CoOp's does
    network: Any
    label_check: LabelCheck | None = None  # scores of the training labels, where the configuration asks for them
    _prompts: Prompts | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Let config key, checkpoint folder and head follow from the class's name, unless it names them itself.

        Classes called ...Trainer are no methods, and stay without.
        """
        super().__init_subclass__(**options)
        if not cls.__name__.endswith("Trainer"):
            cls.node_name = cls.node_name or cls.__name__.upper()
            cls.model_name = cls.model_name or cls.__name__.lower()
            cls.main_head = cls.main_head or cls.model_name

    # Configuration

    @classmethod
    def add_config(cls, cfg: Any) -> None:
        """Add the method's keys to a configuration, in place; keys that exist are left alone."""
        if cls.node_name not in cfg.TRAINER:
            cfg.TRAINER[cls.node_name] = type(cfg)()
            add_keys(cfg, cfg.TRAINER[cls.node_name], cls.config)
        for section, keys in (*SHARED_KEYS, *cls.extra_keys.items()):
            add_keys(cfg, cfg[section], keys)

    @classmethod
    def read_settings(cls, cfg: Any) -> Any:
        """Check the method's node of a configuration and return its values, an instance of `config`.

        Raises:
            ValueError: the node is not there, or a value does not suit its key.
        """
        name = cls.node_name
        if name not in cfg.TRAINER:
            raise ValueError(f"Expected the configuration to have a node TRAINER.{name} but got none: call extend_cfg")
        return read_keys(cfg.TRAINER[name], f"TRAINER.{name}", cls.config)

    @functools.cached_property  # steps ask for it
    def settings(self) -> Any:
        """The method's settings, an instance of `config`, as the configuration has them when first asked for."""
        return self.read_settings(self.cfg)

    @classmethod
    def check_settings(cls, cfg: Any) -> None:
        """Check all settings that can be checked before data and CLIP are loaded.

        Raises:
            ValueError: a key is missing or wrong, or the backbone does not exist.
            FileNotFoundError: the backbone's weights are not there.
        """
        settings = cls.read_settings(cfg)
        for section, keys in (*SHARED_KEYS, *cls.extra_keys.items()):
            if has_keys(cfg[section], keys):
                read_keys(cfg[section], section, keys)
        if not cls.cross_entropy:
            check_plain_loss(cfg.OPTIM, cls.__name__, cls.weighs_classes)
        if asks_for_check(cfg) and not OWN_TOOLBOX:
            raise ValueError("Expected DATASET.SUSPICIOUS to be False and CLEANING none: this toolbox has neither")
        if "WEIGHTS" not in cfg.MODEL.BACKBONE or "TEMPLATE" not in cfg.DATASET:
            raise ValueError(
                "Expected the configuration to have MODEL.BACKBONE.WEIGHTS and DATASET.TEMPLATE: call extend_cfg(cfg)"
            )
        if settings.prec == "fp16" and not OWN_TOOLBOX:
            raise ValueError(
                f"Expected TRAINER.{cls.node_name}.PREC to be fp32, amp or bf16 but got fp16: "
                "this toolbox cannot scale gradients, which half precision needs"
            )
        cls.check_blocks(cfg)
        cls.check_adapters(cfg)
        if not cfg.MODEL.BACKBONE.NAME:
            raise ValueError(without_config(cfg.TRAINER.NAME))
        cls.read_prompts(cfg)
        check_number(cfg.FEATURE_CACHE.LIMIT, "FEATURE_CACHE.LIMIT", low=0)
        check_backbone(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS or None)

    @classmethod
    def check_adapters(cls, cfg: Any) -> None:
        """Refuse MODEL.IMO_WEIGHTS where the method has no use for corrected features.

        Raises:
            ValueError: MODEL.IMO_WEIGHTS is set all the same.
        """
        if cfg.MODEL.get("IMO_WEIGHTS", ""):
            raise ValueError(
                f"Expected MODEL.IMO_WEIGHTS to be '' for {cls.__name__}, which uses no corrected features, "
                f"but got {cfg.MODEL.IMO_WEIGHTS!r}"
            )

    def check_cfg(self, cfg: Any) -> None:
        """Check the configuration by `check_settings`, which needs no instance of the trainer."""
        self.check_settings(cfg)

    @classmethod
    def each_class_has(cls, cfg: Any) -> str:
        """Return what the method has separately for each class under this configuration; see `of_each_class`."""
        return cls.of_each_class

    @classmethod
    def trains(cls, cfg: Any) -> bool:
        """Return whether there is anything to train or to fit."""
        return True

    @classmethod
    def memory_advice(cls, cfg: Any) -> list[str]:
        """Suggest settings that make a run need less memory than with `cfg`, for an engine that asks."""
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

    def templates(self) -> Prompts:
        """Return the prompt templates of zero-shot CLIP, with the classes' own sentences where there are such.

        They are read once: a file of sentences may be large.
        """
        if self._prompts is None:
            self._prompts = self.read_prompts(self.cfg)
        return self._prompts

    @classmethod
    def read_prompts(cls, cfg: Any) -> Prompts:
        """Return the prompts that the configuration asks for.

        Raises:
            ValueError: a template or the file of descriptions is wrong.
            FileNotFoundError: there is no such file.
        """
        templates = templates_for(cfg.DATASET.NAME, cfg.DATASET.TEMPLATE, cls.imagenet_templates)
        path = cfg.DATASET.get("DESCRIPTIONS", "")
        return Prompts(templates, read_descriptions(path), path) if path else Prompts(templates)

    def load_frozen_clip(self, prec: str) -> tuple[CLIP, list[str]]:
        """Load the frozen CLIP that the configuration names, and set up the precision.

        Returns:
            The CLIP, and the class names.

        Raises:
            ValueError: the labels do not fit the class names, a class has no description, or the image size does not
                fit CLIP.
        """
        cfg = self.cfg
        classnames = list(self.dm.dataset.classnames)
        if len(classnames) != self.num_classes:
            raise ValueError(
                f"Expected labels 0 to {len(classnames) - 1} for the {len(classnames)} class names of the training "
                f"images but got labels up to {self.num_classes - 1}"
            )
        sentences_of(self.templates(), classnames)  # raises if some are missing, before CLIP is loaded
        self._set_up_precision(prec)
        logger.info("Loading CLIP (backbone: %s)", cfg.MODEL.BACKBONE.NAME, extra=DETAIL)
        # Without CUDA, fp16 autocasts to bfloat16, so the backbone is kept in bfloat16 too.
        precision = "bf16" if prec == "fp16" and self.device.type != "cuda" else prec
        clip = load_clip(
            cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS or None, precision=precision, device=self.device
        )
        tell_preprocessing(cfg)
        logger.info("Prompts of zero-shot CLIP: %s", self.templates())
        size = (clip.image_size, clip.image_size)
        if tuple(cfg.INPUT.SIZE) != size:
            raise ValueError(f"Expected INPUT.SIZE to be {size} for {clip.name} but got {tuple(cfg.INPUT.SIZE)}")
        if asks_for_check(cfg) and self.dm.dataset.train_x:  # predictions bring no training images
            self._check_labels(clip, classnames, prec)
        return clip, classnames

    def tell_size(self, learner: nn.Module) -> int:
        """Log how many parameters of a learner are trained, and return their number."""
        count = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        logger.info("Parameters to learn: %s", f"{count:,}" if count else "none; the method has no training steps")
        return count

    def seed_or_draw(self) -> int:
        """Return the seed of the configuration, or draw one where that is negative."""
        return self.cfg.SEED if self.cfg.SEED >= 0 else int(torch.randint(2**31, (1,)))

    def _check_labels(self, clip: CLIP, classnames: list[str], prec: str) -> None:
        """Score the training labels, and clean them if the configuration says so, before anything is made of them."""
        encoder = ImageEncoder(clip, prec, self._autocast)
        zeroshot = zeroshot_weights(clip, classnames, self.templates()).float()
        self.label_check = check_labels(self.cfg, self.dm, encoder, self.plain_training_images(), zeroshot)
        self.train_loader_x = self.dm.train_loader_x  # another one after cleaning

    def run_notes(self) -> dict[str, Any]:
        """Return what metrics.json says of the training labels; see dassl/engine/declared.py."""
        return {} if self.label_check is None else self.label_check.notes()

    def run_tables(self) -> dict[str, Any]:
        """Return the list of suspicious training images, where it is asked for; see dassl/engine/declared.py."""
        return {} if self.label_check is None else self.label_check.tables()

    def plain_training_images(self) -> DataLoader[Any]:
        """Return a loader of the training images in order, as they are at test time."""
        transform = build_transform(self.cfg, is_train=False)
        return self.in_order(DatasetWrapper(self.cfg, self.dm.dataset.train_x, transform=transform))

    def in_order(self, images: Dataset[Any]) -> DataLoader[Any]:
        """Return a loader of these images in their order, with the batch size and workers of the test loader."""
        return DataLoader(
            images,
            batch_size=self.cfg.DATALOADER.TEST.BATCH_SIZE,
            **workers_like(self.dm.test_loader),
            generator=torch.Generator(),  # for the workers: the program's own draws then do not depend on the cache
        )

    # One step

    def run(self, inputs: Any, labels: Tensor) -> Any:
        """Run the network on a training batch.

        Args:
            inputs: what `parse_batch_train` gives beside the labels, such as images [B, 3, H, W].
            labels: [B].

        Returns:
            Logits [B, C], or whatever `loss` takes.
        """
        return self.network(inputs)

    def loss(self, outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        """Return the named losses of a step; their sum is minimized. Here: cross-entropy, or what OPTIM.LOSS says.

        Args:
            outputs: what `run` returned.
            labels: [B].
        """
        return {"loss": self.class_loss(outputs, labels)}

    def class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of logits [B, C], or what OPTIM.LOSS and CLASS_WEIGHTS put in its place."""
        return class_loss(logits, labels, self.cfg.OPTIM.get("LOSS", "ce"), self._class_weights)

    @functools.cached_property
    def _class_weights(self) -> Tensor | None:
        """The weight of an image of each class, [C]; None: 1."""
        if self.cfg.OPTIM.get("CLASS_WEIGHTS", "none") == "none":
            return None
        return balanced_weights([item.label for item in self.dm.dataset.train_x], self.num_classes, self.device)

    def shown_logits(self, outputs: Any) -> Tensor:
        """Return the logits [B, C] whose accuracy on the training batch is shown."""
        return outputs

    def watch(self, outputs: Any) -> dict[str, Tensor]:
        """Return named scalar tensors [] that TensorBoard shows beside the losses."""
        return {}

    def step_context(self) -> Any:
        """Return the context in which a step computes outputs and losses."""
        return self._autocast()

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Make one training step.

        Returns:
            The loss, the accuracy (percent), and each named loss. If the loss or a gradient is not finite, the step
            changes nothing (see `model_update`), but its numbers are returned all the same.
        """
        inputs, labels = self.parse_batch_train(batch)
        with self.step_context():
            outputs = self.run(inputs, labels)
            terms = self.loss(outputs, labels)
            loss = total(terms)
        summary = {
            "loss": loss.detach(),
            "acc": compute_accuracy(self.shown_logits(outputs).detach(), labels)[0].squeeze(),
            **{name: value.detach() for name, value in terms.items()},
        }
        watched = self.watch(outputs)
        numbers = sent([*summary.values(), *watched.values()])  # sent before the step, which waits for the device
        self.model_backward_and_update(loss)
        if self.per_step or self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        values = numbers()
        step = self.epoch * self.num_batches + self.batch_idx
        for name, value in zip(watched, values[len(summary) :], strict=True):
            self.write_scalar(f"train/{name}", value, step)
        return dict(zip(summary, values, strict=False))

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the images [B, 3, H, W] and labels [B] of a training batch, on the device."""
        images, labels = batch["img"], batch["label"]
        # From pinned memory, the copy runs while the program goes on.
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def no_validation(self) -> str:
        """Return why there are no validation images to choose settings on, or "" where there are some.

        Test images that a dataset reader hands out as validation images do not count.
        """
        val, test = self.dm.dataset.val, self.dm.dataset.test
        if self.val_loader is None or not val:
            return "no validation set"
        if str(self.cfg.DATASET.get("VAL", "")).lower() == "coop":
            return "DATASET.VAL is coop: the validation images are test images"
        tested = {item.impath for item in test or ()}
        if any(item.impath in tested for item in val):
            return "validation images are test images"
        return ""

    # Evaluation

    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Return the logits [B, C] of every head, by name, for images [B, 3, H, W]."""
        raise NotImplementedError

    def model_inference(self, input: Tensor) -> Tensor:
        """Return the logits [B, C] of the main head for images [B, 3, H, W]."""
        return self.model_heads(input)[self.main_head]

    @torch.no_grad()
    def _collect(self, loader: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Return the logits [n, C] of every head and the labels [n] of all images of a loader, on the CPU."""
        self.set_model_mode("eval")
        batches, labels = [], []
        for batch in loader:
            images, label = self.parse_batch_test(batch)
            batches.append({head: logits.cpu() for head, logits in self.model_heads(images).items()})
            labels.append(label.cpu())
        return {head: torch.cat([batch[head] for batch in batches]) for head in batches[0]}, torch.cat(labels)
