"""Train or fit a method on features of the frozen CLIP, which are computed once (see ../features).

Legend: B images, N training images, C classes, E width of the joint embedding. Features are L2-normalised, fp32.
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

from ..clip import CLIP, zeroshot_weights
from ..features.cache_key import feature_slot
from ..features.corrected import CorrectedEncoder, check_adapters, load_adapters
from ..features.encoder import FeatureSet, ImageEncoder
from ..features.loaders import FeatureLoader, OneStep, TrainingFeatures, collect_features
from ..features.views import Mirror, SeededViews
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
    """Trains a `FeatureLearner` by cross-entropy, or, where it has no parameters to train, fits it in one step.

    The schedule of the learning rate counts steps where `per_step`, else epochs. `model_heads` takes images or
    features; the loaders of training, validation and test hand out features.
    """

    network: FeatureNetwork
    train_features: TrainingFeatures
    train_loader_x: Any
    val_loader: Any
    test_loader: Any
    per_step = True
    mirror = False  # whether a mirrored copy of each training image, as it is at test time, stands beside it
    raw_mean = False  # whether text features of several templates are averaged as CLIP gives them, not normalised
    eps = 0.0  # of Adam-type optimisers; 0: their own

    # Configuration

    @classmethod
    def check_adapters(cls, cfg: Any) -> None:
        """Check MODEL.IMO_WEIGHTS, where the method uses corrected features; see CLIPTrainer.

        Raises:
            ValueError: they are missing, not wanted, or made for another backbone.
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
        """Zero-shot weights [C, E], normalised."""
        return zeroshot_weights(clip, classnames, self.templates(), self.raw_mean)

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """What is to be trained or fitted."""
        raise NotImplementedError

    def build_model(self) -> None:
        """CLIP, the learner on its features, the loaders of features, and the optimiser of what is learnt."""
        cfg = self.cfg
        clip, classnames = self.load_frozen_clip(self.settings.prec)
        learner = self.build_learner(clip, classnames, self.zeroshot(clip, classnames).float())
        self.network = FeatureNetwork(self.build_encoder(clip), learner)
        self.selected = {}
        self._set_up_loaders()
        self._register(learner, cfg.OPTIM)

    def build_encoder(self, clip: CLIP) -> ImageEncoder:
        """What encodes images: CLIP, and where MODEL.IMO_WEIGHTS is set CLIP with those adapters beside it."""
        weights = self.cfg.MODEL.get("IMO_WEIGHTS", "")
        if not weights:
            return ImageEncoder(clip, self.settings.prec, self._autocast)
        return CorrectedEncoder(clip, self.settings.prec, self._autocast, load_adapters(weights, clip))

    def _set_up_loaders(self) -> None:
        cfg = self.cfg
        self._seed = cfg.SEED if cfg.SEED >= 0 else int(torch.randint(2**31, (1,)))
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
        """Steps in an epoch; 0: one pass over the training images."""
        return 0

    def pooled_views(self) -> int:
        """Views of each training image that count as images of their own in every epoch; 0: an epoch sees one view."""
        return 2 if self.mirror else 0

    def _register(self, learner: FeatureLearner, optim_cfg: Any) -> None:
        count = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        logger.info("Parameters to learn: %s", f"{count:,}")
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
            self.train_loader_x = OneStep(self.train_features)
            self.register_model(self.model_name, learner, None, None)

    def _encode_training_images(self) -> FeatureSet:
        """Features of the training images, in all views."""
        views = self.views
        known = self._encode_views(build_transform(self.cfg, is_train=views > 0), views)
        if not self.mirror:
            return known
        mirrored = self._encode_views(Compose([build_transform(self.cfg, is_train=False), Mirror()]), 0)
        return FeatureSet(torch.cat([known.values, mirrored.values]), known.labels, known.paths)

    def _encode_views(self, transform: Any, views: int) -> FeatureSet:
        """Features of the training images under a transform; with `views` above 0 it is random, and seeded."""
        items = self.dm.dataset.train_x
        images = DatasetWrapper(self.cfg, items, transform=transform)
        data = SeededViews(images, views, self._seed) if views else images
        loader = self.in_order(data)
        logger.info("Features of %d training images, %s", len(items), f"{views} views each" if views else "as they are")
        seeded = self.cfg.SEED >= 0 or not views  # else no later run would ask for these views
        # Their lengths count where views are averaged.
        encode = self.network.encode.raw() if views > 1 else self.network.encode
        slot = feature_slot(self.cfg, encode, loader, "train") if seeded else None
        features = collect_features(loader, encode, max(views, 1), slot)
        wanted = self.network.encode.unit
        return features.normalised(encode.parts) if wanted and not encode.unit else features

    # One step

    def prepare(self, features: FeatureSet) -> None:
        """Computes what follows from the training features, before the first step of a run."""

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Fits a learner without trainable parameters to the training features -> what to show of it."""
        raise NotImplementedError

    def before_epoch(self) -> None:
        """Has the training features follow the epoch."""
        super().before_epoch()
        self.train_features.set_epoch(self.epoch)

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """-> features [B, E] and labels [B], on the device."""
        return self.parse_batch_test(batch)

    def parse_batch_test(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """-> features [B, E] and labels [B], on the device."""
        features = batch["feature"] if "feature" in batch else self.network.encode(batch["img"].to(self.device))
        return features, batch["label"].to(self.device)

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Make one step, or fit, and return what there is to show of it; see CLIPTrainer."""
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
        """Return a context that does nothing: what learns on features computes in fp32."""
        return contextlib.nullcontext()

    def get_current_lr(self, names: Any = None) -> float:
        """The learning rate; 0 where nothing is trained."""
        return super().get_current_lr(names) if self._optim is not None else 0.0

    # Choosing on validation images

    def choose(self) -> None:
        """Chooses what is to be chosen on the few-shot validation images, and notes it in `selected`."""

    def after_epoch(self) -> None:
        """Chooses before a checkpoint may be written, so that every checkpoint carries the choice."""
        done, freq = self.epoch + 1, self.cfg.TRAIN.CHECKPOINT_FREQ
        saves = done == self.max_epoch or (freq > 0 and done % freq == 0)
        if saves or self.cfg.TEST.FINAL_MODEL == "best_val":
            with torch.no_grad():
                self.choose()
        super().after_epoch()

    def validation_features(self) -> tuple[Tensor, Tensor] | str:
        """Features [n, E] and labels [n] of the validation images; or why there is nothing to choose on."""
        reason = self.no_validation()
        if reason:
            return reason
        assert self.val_loader is not None
        known = self.val_loader.all()
        return known.values[0], known.labels

    def note(self, chosen: Mapping[str, float], on: str, n: int) -> None:
        """Records what was chosen, on what ("val", or why it was not chosen), on how many images."""
        self.selected = {name: {"value": value, "on": on, "n": n} for name, value in chosen.items()}
        values = ", ".join(f"{name} {value:.4g}" for name, value in chosen.items())
        logger.info("Chosen: %s (on %s%s)", values, on, f", {n} images" if n else "")

    # Evaluation

    @torch.no_grad()
    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] or features [B, E] -> logits [B, C] of zero-shot CLIP and of the method."""
        clip_logits, logits = self.network.both(input)
        return {self.reference_head: clip_logits, self.main_head: logits}
