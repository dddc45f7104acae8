"""Train or fit a method on features of the frozen CLIP, which are computed once (see ../features).

Legend: B images, N training images, C classes, E width of the joint embedding. Features are L2-normalized, fp32.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import Compose

from dassl.data import DatasetWrapper
from dassl.data.transforms import build_transform
from dassl.optim import build_lr_scheduler, build_optimizer

from ..clip import CLIP, tell_alike, zeroshot_weights
from ..features.cache_key import feature_slot
from ..features.corrected import CorrectedEncoder, check_adapters, load_adapters
from ..features.encoder import FeatureSet, ImageEncoder
from ..features.loaders import FeatureLoader, OneStep, TrainingFeatures, collect_features
from ..features.views import Mirror, SeededViews
from ..log import DETAIL
from .feature_learner import FeatureLearner, FeatureNetwork
from .keys import key
from .learner_trainer import LearnerTrainer
from .schedule import build_optimizer_with_eps, count_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorrectedKeys:
    """Keys of MODEL for methods that can use corrected features."""

    imo_weights: str = key(
        "",
        "file of adapters that IMO or IMODINO saved, or the output folder of such a run; '': features as CLIP gives "
        "them",
    )


class FeatureTrainer(LearnerTrainer):
    """Train a `FeatureLearner` by cross-entropy; where the learner has no parameters to train, fit it in one step.

    The learning-rate schedule counts steps if `per_step` is set, else epochs. `model_heads` takes images or features;
    the loaders of training, validation and test images hand out features.
    """

    network: FeatureNetwork
    train_features: TrainingFeatures
    train_loader_x: Any
    val_loader: Any
    test_loader: Any
    per_step = True
    projected = True  # whether features are CLIP's final ones; False: those before CLIP's last projection
    mirror = False  # whether training also uses a mirrored copy of each training image, transformed as at test time
    raw_mean = False  # True: text features of several templates are averaged as CLIP gives them, not normalized first
    eps = 0.0  # epsilon of Adam-type optimizers; 0: their default

    # Configuration

    @classmethod
    def needs_blocks(cls, cfg: Any) -> str:
        """Return what the method does within the image encoder; see BlocksNeeded."""
        if cfg.MODEL.get("IMO_WEIGHTS", ""):
            return "corrects features within the image encoder (MODEL.IMO_WEIGHTS)"
        return super().needs_blocks(cfg) if cls.projected else "takes features before the image encoder's last matrix"

    @classmethod
    def check_adapters(cls, cfg: Any) -> None:
        """Check MODEL.IMO_WEIGHTS, where the method uses corrected features; see CLIPTrainer.

        Raises:
            ValueError: the adapters are missing, not wanted, or made for another backbone.
            FileNotFoundError: there is no such file.
        """
        weights = cfg.MODEL.get("IMO_WEIGHTS", "")
        if cls.adapters == "none":
            super().check_adapters(cfg)
        elif weights:
            check_adapters(weights, cfg.MODEL.BACKBONE.NAME)
        elif cls.adapters == "needed":
            raise ValueError(
                f"Expected MODEL.IMO_WEIGHTS to be adapters that IMO or IMODINO saved, which {cls.__name__} "
                "needs, but got ''"
            )

    @property
    def views(self) -> int:
        """Augmentations of each training image whose features are kept; 0: the images as they are at test time."""
        return int(self.cfg.TRAINER[self.node_name].get("VIEWS", 0))

    # Building

    def zeroshot(self, clip: CLIP, classnames: Sequence[str]) -> Tensor:
        """Return the zero-shot weights [C, E], normalized."""
        return zeroshot_weights(clip, classnames, self.templates(), self.raw_mean)

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the learner that is to be trained or fitted."""
        raise NotImplementedError

    def build_model(self) -> None:
        """Build CLIP, the learner on its features, the loaders of features, and the learner's optimizer."""
        cfg = self.cfg
        clip, classnames = self.load_frozen_clip(self.settings.prec)
        zeroshot = self.zeroshot(clip, classnames).float()
        tell_alike(clip, classnames, zeroshot)
        learner = self.build_learner(clip, classnames, zeroshot)
        self.network = FeatureNetwork(self.build_encoder(clip), learner)
        self.selected = {}
        self._set_up_loaders()
        self._register(learner, cfg.OPTIM)

    def build_encoder(self, clip: CLIP) -> ImageEncoder:
        """Build the encoder of images: CLIP, and beside it CLIP with adapters where MODEL.IMO_WEIGHTS is set."""
        weights = self.cfg.MODEL.get("IMO_WEIGHTS", "")
        if not weights:
            encoder = ImageEncoder(clip, self.settings.prec, self._autocast)
            return encoder if self.projected else encoder.before_projection()
        return CorrectedEncoder(clip, self.settings.prec, self._autocast, load_adapters(weights, clip))

    def _set_up_loaders(self) -> None:
        cfg = self.cfg
        self._seed = self.seed_or_draw()
        n, size = len(self.dm.dataset.train_x), cfg.DATALOADER.TRAIN_X.BATCH_SIZE
        self.train_features = TrainingFeatures(
            self._encode_training_images,
            n,
            size,
            self._seed,
            steps=self.epoch_steps(),
            every_view=self.pooled_views(),
            drop_last=self.drop_last,
        )
        self.train_loader_x = self.train_features
        if self.val_loader is not None:
            self.val_loader = self._with_features(self.val_loader, "val")
        self.test_loader = self._with_features(self.test_loader, "test")

    def _with_features(self, loader: Any, split: str) -> FeatureLoader:
        encode = self.network.encode
        return FeatureLoader(loader, encode, feature_slot(self.cfg, encode, loader, split))

    def epoch_steps(self) -> int:
        """Return the number of steps in an epoch; 0: one pass over the training images."""
        return 0

    def pooled_views(self) -> int:
        """Return how many views of a training image each epoch takes as separate images; 0: an epoch sees one view."""
        return 2 if self.mirror else 0

    def _register(self, learner: FeatureLearner, optim_cfg: Any) -> None:
        count = self.tell_size(learner)
        self._optim = None
        if count:
            if self.eps:
                self._optim = build_optimizer_with_eps(learner, optim_cfg, self.eps)
            else:
                self._optim = build_optimizer(learner, optim_cfg)
            schedule = count_steps(optim_cfg, len(self.train_loader_x)) if self.per_step else optim_cfg
            self.register_model(self.model_name, learner, self._optim, build_lr_scheduler(self._optim, schedule))
        else:
            self.max_epoch = 1
            features = self.train_features
            self.train_loader_x = OneStep(features.dataset, lambda: features.all().labels)
            self.register_model(self.model_name, learner, None, None)

    def _encode_training_images(self) -> FeatureSet:
        """Return the features of the training images, in all views."""
        views = self.views
        known = self._encode_views(build_transform(self.cfg, is_train=views > 0), views)
        if not self.mirror:
            return known
        mirrored = self._encode_views(Compose([build_transform(self.cfg, is_train=False), Mirror()]), 0)
        return FeatureSet(torch.cat([known.values, mirrored.values]), known.labels, known.paths)

    def _encode_views(self, transform: Any, views: int) -> FeatureSet:
        """Return the features of the training images; with `views` above 0, `transform` is random, and seeded."""
        items = self.dm.dataset.train_x
        images = DatasetWrapper(self.cfg, items, transform=transform)
        data = SeededViews(images, views, self._seed) if views else images
        loader = self.in_order(data)
        logger.info(
            "Features of %d training images, %s",
            len(items),
            f"{views} views each" if views else "as they are",
            extra=DETAIL,
        )
        seeded = self.cfg.SEED >= 0 or not views  # without a seed, no later run would ask for these views
        # Where views are averaged, the lengths of their features count.
        encode = self.network.encode.raw() if views > 1 else self.network.encode
        slot = feature_slot(self.cfg, encode, loader, "train") if seeded else None
        features = collect_features(loader, encode, max(views, 1), slot)
        wanted = self.network.encode.unit
        return features.normalized(encode.parts) if wanted and not encode.unit else features

    # One step

    def prepare(self, features: FeatureSet) -> None:
        """Compute what follows from the training features, before the first step of a run."""

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Fit a learner without trainable parameters to the training features, and return the numbers to show."""
        raise NotImplementedError

    def before_epoch(self) -> None:
        """Set the epoch of the training features, which decides view and order."""
        super().before_epoch()
        self.train_features.set_epoch(self.epoch)

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the features [B, E] and labels [B] of a training batch, on the device."""
        return self.parse_batch_test(batch)

    def parse_batch_test(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the features [B, E] and labels [B] of a batch, on the device; images are encoded where needed."""
        features = batch["feature"] if "feature" in batch else self.network.encode(batch["img"].to(self.device))
        return features, batch["label"].to(self.device)

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Make one step, or fit the learner, and return the numbers to show; see CLIPTrainer."""
        learner = self.network.learner
        if not learner.peek("prepared", learner.prepared):
            with torch.no_grad():
                self.prepare(self.train_features.all())
            learner.prepared.fill_(True)
        if self._optim is None:
            with torch.no_grad():
                return self.fit(self.train_features.all())
        return super().forward_backward(batch)

    def step_context(self) -> Any:
        """Return a context that does nothing: methods on features compute in fp32."""
        return contextlib.nullcontext()

    # Choosing on validation images

    def choose(self) -> None:
        """Choose the method's settings on the few-shot validation images, and note them in `selected`; here none."""

    def after_epoch(self) -> None:
        """Choose before a checkpoint may be written, so that every checkpoint carries the choice."""
        done, freq = self.epoch + 1, self.cfg.TRAIN.CHECKPOINT_FREQ
        saves = done == self.max_epoch or (freq > 0 and done % freq == 0)
        if saves or self.cfg.TEST.FINAL_MODEL == "best_val":
            with torch.no_grad():
                self.choose()
        super().after_epoch()

    def validation_features(self) -> tuple[Tensor, Tensor] | str:
        """Return features [n, E] and labels [n] of the validation images, or why there are none to choose on."""
        reason = self.no_validation()
        if reason:
            return reason
        assert self.val_loader is not None
        known = self.val_loader.all()
        return known.values[0], known.labels

    def note(self, chosen: Mapping[str, float], on: str, n: int) -> None:
        """Record the chosen values in `selected`.

        Args:
            chosen: name -> value.
            on: "val", or why the values were not chosen.
            n: number of images that they were chosen on.
        """
        self.selected = {name: {"value": value, "on": on, "n": n} for name, value in chosen.items()}
        values = ", ".join(f"{name} {value:.4g}" for name, value in chosen.items())
        logger.info("Chosen: %s (on %s%s)", values, on, f", {n} images" if n else "", extra=DETAIL)

    # Evaluation

    @torch.no_grad()
    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Return the logits [B, C] of zero-shot CLIP and of the method for images [B, 3, H, W] or features [B, E]."""
        clip_logits, logits = self.network.both(input)
        return {self.reference_head: clip_logits, self.main_head: logits}
