"""Trainers of the adapters that correct the overlap of CLIP's image features: `IMO`, by labels, and `IMODINO`, by DINO.

Both train on a generic image set, with CLIP frozen, and leave `imo_adapters.safetensors`, `overlap.json` and
`overlap.png` in the output folder. Under torchrun each process takes its share of every batch; batches, augmentations
and so the result are those of a run in one process.

Legend: B images of this process, G global and L local crops, V = G + L, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dassl.data import DatasetWrapper
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from dassl.optim import build_optimizer

from ..base import EncoderTrainer
from ..clip import CLIP, IMAGENET_TEMPLATES_SELECT
from ..features.corrected import FILE_NAME, save_adapters
from ..files import write_png, write_text
from .config import IMOConfig, IMODINOConfig
from .data import EpochBatches, MultiCrop, mean_of_processes, process_rank, training_loader
from .dino import (
    clip_gradients,
    cosine,
    cosine_momentum,
    dino_loss,
    learning_rate,
    teacher_targets,
    teacher_temperature,
    update_centre,
)
from .measures import Measures, draw_histograms, measure
from .network import AdapterLearner, DINOLearner, IMONetwork, SupervisedLearner

logger = logging.getLogger(__name__)


class AdapterTrainer(EncoderTrainer):
    """The base of both trainers: seeded batches, measures on held-out generic images, the adapters' file."""

    recipe = 2
    network: IMONetwork
    train_loader_x: Any
    extra_keys = {}
    no_views = "whose adapters sit throughout the image tower"
    model_name = "imo"
    main_head = "adapted"
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    per_step = True

    # Building

    def build_learner(self, clip: CLIP, classnames: Sequence[str]) -> AdapterLearner:
        """Build the learner: the adapters, and what trains them."""
        raise NotImplementedError

    def training_transform(self) -> Any:
        """Return the transform of a PIL image to what a step sees of it."""
        return build_transform(self.cfg, is_train=True)

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> IMONetwork:
        """Build CLIP with adapters, and replace the loader of training images by a seeded one."""
        cfg = self.cfg
        self._seed = self.seed_or_draw()
        self._before: Measures | None = None
        self._images_per_step = cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        items = self.dm.dataset.train_x
        if items:  # predictions need none
            epochs, like = max(1, cfg.OPTIM.MAX_EPOCH), self.dm.test_loader
            self.train_loader_x = training_loader(cfg, items, self.training_transform(), self._seed, epochs, like)
            self._images_per_step = self.train_loader_x.batch_sampler.size
        return IMONetwork(clip, classnames, templates, self.build_learner(clip, classnames))

    @property
    def adapter_arguments(self) -> dict[str, Any]:
        """The arguments that the learners of both trainers take."""
        settings = self.settings
        adapters = {"form": settings.form, "scale": settings.scale, "dropout": settings.dropout}
        return {"dim": settings.dim, "adapters": adapters, "raw": settings.features == "raw"}

    # Training

    def before_train(self) -> None:
        """Measure CLIP's own features, without the adapters, which are trained already in a resumed run."""
        super().before_train()
        if self._held_out():
            self._before = self._measure(adapted=False)
            self._log_measures(self._before, "before", 0)

    def before_epoch(self) -> None:
        """Tell the batches which epoch begins."""
        super().before_epoch()
        batches = self.train_loader_x.batch_sampler
        assert isinstance(batches, EpochBatches)
        batches.epoch = self.epoch

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Make one step, and measure where this is due.

        It is due after every MEASURE_FREQ steps (0: never), if held-out images are measured at all. At the end of an
        epoch, `after_epoch` measures instead.
        """
        rank, world = process_rank()
        # What is dropped follows from the step, not from what was drawn before it: a resumed run drops what an
        # uninterrupted one does, and several processes what one does.
        step = self.epoch * self.num_batches + self.batch_idx
        self.network.learner.adapters.dropout.seed((1_000_003 * self._seed + step) % 2**63, self.device, rank, world)
        summary = mean_of_processes(self.step(batch))
        done, freq = self.epoch * self.num_batches + self.batch_idx + 1, self.settings.measure_freq
        if freq and done % freq == 0 and self.batch_idx + 1 < self.num_batches and self._held_out():
            self._log_measures(self._measure(), f"after {done} steps", done)
            self.set_model_mode("train")
        return summary

    def step(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Make one step, and return what to show of it."""
        return super().forward_backward(batch)

    def after_epoch(self) -> None:
        """Measure, and write the adapters and their measures, before a checkpoint may be written."""
        after = self._measure() if self._held_out() else None
        done = (self.epoch + 1) * self.num_batches
        if after is not None:
            self._log_measures(after, f"after epoch {self.epoch + 1}", done)
        if process_rank()[0] == 0:
            recipe = {
                "trainer": type(self).__name__,
                "epochs": self.epoch + 1,
                "steps": done,
                "processes": process_rank()[1],
                "data": self.cfg.DATASET.NAME,
                "data_digest": getattr(self.dm.dataset, "split_digest", ""),
                "config": self.cfg.dump(),
            }
            save_adapters(
                os.path.join(self.output_dir, FILE_NAME), self.network.learner.result, self.network.clip, recipe
            )
            if after is not None:
                self._write_measures(after, done)
        super().after_epoch()

    # Measures on held-out generic images

    def _held_out(self) -> list[Any]:
        """Return some of the validation images, which one seed chooses for all runs.

        The list is empty where overlap has no meaning (only one class, or no two images of one class), and in all
        processes but the first.
        """
        items = list(self.dm.dataset.val or ()) if process_rank()[0] == 0 else []
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(items), generator=generator)[: self.settings.measure_images].tolist()
        items = [items[i] for i in sorted(order)]
        return items if 1 < len({item.label for item in items}) < len(items) else []

    @torch.no_grad()
    def _measure(self, adapted: bool = True) -> Measures:
        """Measure the held-out images, with the adapters or without."""
        self.set_model_mode("eval")
        encode = self.network.corrected if adapted else self.network.clip.encode_image
        return measure(*self._encode(self._held_out(), encode))

    def _encode(self, items: Sequence[Any], encode: Any) -> tuple[Tensor, Tensor]:
        """Return features [n, E], fp32, and labels [n] of images, transformed as at test time."""
        data = DatasetWrapper(self.cfg, items, transform=build_transform(self.cfg, is_train=False))
        loader: DataLoader[Any] = DataLoader(data, batch_size=self.cfg.DATALOADER.TEST.BATCH_SIZE)
        features, labels = [], []
        for batch in loader:
            images, label = self.parse_batch_test(batch)
            with self._autocast():
                features.append(encode(images).float())
            labels.append(label)
        return torch.cat(features), torch.cat(labels)

    def _log_measures(self, measures: Measures, when: str, step: int) -> None:
        logger.info("Held-out images %s: overlap %.4f, variance %.3e", when, measures.overlap, measures.variance)
        self.write_scalar("held_out/overlap", measures.overlap, step)
        self.write_scalar("held_out/variance", measures.variance, step)

    def _write_measures(self, after: Measures, step: int) -> None:
        if self._before is None:
            self._before = self._measure(adapted=False)
        found = {
            name: {"overlap": m.overlap, "variance": m.variance}
            for name, m in (("before", self._before), ("after", after))
        }
        record = {"data": self.cfg.DATASET.NAME, "part": "val", "images": len(self._held_out()), **found}
        write_text(os.path.join(self.output_dir, "overlap.json"), json.dumps(record, indent=2) + "\n")
        figure = draw_histograms(self._before, after, f"{self.cfg.DATASET.NAME}, held-out images")
        write_png(os.path.join(self.output_dir, "overlap.png"), figure, dpi=120)
        if self.writer is not None:
            self.writer.add_figure("held_out/histograms", figure, step)


@TRAINER_REGISTRY.register()
class IMO(AdapterTrainer):
    """Adapters trained by cross-entropy through a linear classifier, which is thrown away."""

    node_name = "IMO"
    paper = "Kravets and Namboodiri 2024"
    learns = "adapters that correct image features, by labels"
    config = IMOConfig

    def training_transform(self) -> Any:
        """Build the transform of the view that the setting VIEW names; see AdapterTrainer."""
        view, names = self.settings.view, self.cfg.INPUT.TRANSFORMS
        if view == "center_crop_unnormalized":
            names = [name for name in ([names] if isinstance(names, str) else names) if name != "normalize"]
        return build_transform(self.cfg, is_train=view == "augmented", choices=names)

    def build_learner(self, clip: CLIP, classnames: Sequence[str]) -> AdapterLearner:
        """Build adapters and classifier."""
        learner = SupervisedLearner(clip, classnames, **self.adapter_arguments, scale=self.settings.logit_scale)
        if self.settings.init_images and self.dm.dataset.train_x:
            learner.start_from(self._class_means(clip, len(classnames)))
        return learner

    @torch.no_grad()
    def _class_means(self, clip: CLIP, num_classes: int) -> Tensor:
        """Return the means [C, E] of CLIP's features of the first INIT_IMAGES images of each class.

        The features are normalized before averaging, and the means after it.
        """
        items: list[Any] = []
        count = [0] * num_classes
        for item in self.dm.dataset.train_x:
            count[item.label] += 1
            if count[item.label] <= self.settings.init_images:
                items.append(item)
        features, labels = self._encode(items, clip.encode_image)
        sums = torch.zeros(num_classes, clip.embed_dim, device=features.device)
        return F.normalize(sums.index_add(0, labels, F.normalize(features, dim=-1)), dim=-1)


@TRAINER_REGISTRY.register()
class IMODINO(AdapterTrainer):
    """Adapters trained by self-distillation, without labels: the student matches the teacher's view of another crop."""

    node_name = "IMODINO"
    paper = "Kravets and Namboodiri 2024"
    learns = "adapters that correct image features, without labels"
    cross_entropy = False
    config = IMODINOConfig
    model_name = "imodino"

    def training_transform(self) -> Any:
        """Return the transform of a PIL image to two global crops and some local ones."""
        settings, size = self.settings, self.cfg.INPUT.SIZE
        return MultiCrop(
            (size[0], size[1]),
            settings.local_crops,
            tuple(settings.global_scale),
            tuple(settings.local_scale),
            settings.augment,
            settings.crop_mean or self.cfg.INPUT.PIXEL_MEAN,
            settings.crop_std or self.cfg.INPUT.PIXEL_STD,
        )

    def build_learner(self, clip: CLIP, classnames: Sequence[str]) -> AdapterLearner:
        """Build student and teacher."""
        settings = self.settings
        return DINOLearner(
            clip,
            classnames,
            **self.adapter_arguments,
            hidden=settings.hidden_dim,
            bottleneck=settings.bottleneck_dim,
            out=settings.out_dim,
            save=settings.save,
            train_head=settings.train_head,
        )

    def build_optimizer(self, learner: AdapterLearner) -> Any:
        """Build the optimizer at OPTIM.LR times the images of a step / 256; biases are not decayed."""
        optim_cfg = self.cfg.OPTIM.clone()
        optim_cfg.defrost()
        optim_cfg.LR = self.cfg.OPTIM.LR * self._images_per_step / 256
        named = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for _, p in named if p.ndim > 1]},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._student_optim: torch.optim.Optimizer = build_optimizer(learner, optim_cfg, param_groups=groups)
        return self._student_optim

    def build_schedule(self, optim: Any) -> Any:
        """Build the schedule that TRAINER.IMODINO.SCHEDULE names."""
        if self.settings.schedule == "optim":
            return super().build_schedule(optim)
        full, least = float(optim.param_groups[0]["lr"]), self.settings.lr_min
        per_epoch = len(self.train_loader_x)
        steps, warmup = self.max_epoch * per_epoch, self.cfg.OPTIM.WARMUP_EPOCH * per_epoch
        share = full or 1.0  # LambdaLR multiplies
        return torch.optim.lr_scheduler.LambdaLR(optim, lambda t: learning_rate(t, steps, warmup, full, least) / share)

    def _update_student(self, loss: Tensor, step: int, steps: int) -> None:
        """Make one step of the optimizer, with the step's weight decay and gradients of at most CLIP_GRAD."""
        optim = self._student_optim
        optim.param_groups[0]["weight_decay"] = cosine(
            step, steps, self.cfg.OPTIM.WEIGHT_DECAY, self.settings.weight_decay_end
        )
        self.model_zero_grad()
        kept = self.model_backward(loss)
        if self.settings.clip_grad and kept:
            self.average_gradients()
            self._unscale(optim)
            clip_gradients(self.network.learner.parameters(), self.settings.clip_grad)
        self.model_update()

    def after_update(self) -> None:
        """Move the center and the teacher."""
        learner, (seen, momentum) = self.network.learner, self._following
        assert isinstance(learner, DINOLearner)
        update_centre(learner.centre, seen, self.settings.centre_momentum)
        learner.follow(momentum)

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return global crops [G, B, 3, S, S] and local ones [L, B, 3, S, S], on the device."""
        big, small = batch["img"]
        return big.transpose(0, 1).to(self.device), small.transpose(0, 1).to(self.device)

    def step(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Make one step of the student, the center and the teacher, and return the loss and what moves it."""
        settings, learner = self.settings, self.network.learner
        assert isinstance(learner, DINOLearner)
        big, small = self.parse_batch_train(batch)
        crops = torch.cat([big, small])  # [V, B, 3, S, S]
        learner.head.freeze_last = self.epoch < settings.freeze_last_layer
        temperature = teacher_temperature(
            self.epoch, settings.teacher_temp_start, settings.teacher_temp, settings.teacher_temp_warmup
        )
        with self._autocast():
            seen = self.network.teacher(big.flatten(0, 1)).unflatten(0, big.shape[:2])  # [G, B, K]
            outputs = self.network.student(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])  # [V, B, K]
        loss = dino_loss(outputs, teacher_targets(seen, learner.centre, temperature), settings.student_temp)
        step, steps = self.epoch * self.num_batches + self.batch_idx, self.max_epoch * self.num_batches
        momentum = cosine_momentum(step, steps, settings.momentum)
        self._following = seen, momentum
        self._update_student(loss, step, steps)
        self.update_lr()
        return {"loss": float(loss.detach()), "momentum": momentum, "teacher_temp": temperature}
