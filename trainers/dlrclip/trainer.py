"""The trainer DLRCLIP: reads the configuration, builds the network, and says what one step, one epoch and a report are.

It needs only what upstream Dassl offers. The toolbox of this project offers more (mixed precision with gradient
scaling, evaluation of several heads in one pass): where that is present it is used, elsewhere it is done without.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dassl.data import DatasetWrapper
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from dassl.optim import build_lr_scheduler

from ..base import ViewsTrainer, build_optimizer_with_eps, count_steps
from ..clip import CLIP, IMAGENET_TEMPLATES_SELECT, tell_alike
from ..features import (
    FeatureLoader,
    FrozenPart,
    ImageEncoder,
    KnownFeatures,
    OneStep,
    PatchEncoder,
    SeededViews,
    collect_features,
    feature_slot,
)
from ..log import DETAIL
from ..portable import class_indices
from .calibration import Branches, all_features, all_reports, fit_mixture
from .config import DLRCLIPConfig
from .glr import best_beta
from .network import DLRCLIPNetwork, ImageFeatures
from .pseudo_shifts import SHIFTS, shifted
from .robust import Evidence

logger = logging.getLogger(__name__)

NOT_CHOSEN = "mean learnt w (beta was not chosen)"


class GivenImages(NamedTuple):
    """Test images, and what is known of their zero-shot features.

    Attributes:
        images: [B, 3, H, W], or None where their features suffice.
        features: [B, E], or [B, E + T] where patches are read; None where they are not known.
        place: where features are not known but wanted, which they are: see KnownFeatures; else None.
    """

    images: Tensor | None
    features: Tensor | None = None
    place: tuple[str, int] | None = None


@TRAINER_REGISTRY.register()
class DLRCLIP(ViewsTrainer):
    """Few-shot adaptation of CLIP by a cross-modal adapter and a gated logit refiner.

    See dassl/engine/declared.py for what the engine asks of a trainer.
    """

    network: DLRCLIPNetwork
    recipe = 4
    node_name = "DLRCLIP"
    paper = "DLR-CLIP"
    learns = "adapters shared by both encoders, a logit refiner, a fusion gate"
    config = DLRCLIPConfig
    model_name = "dlrclip"
    main_head = "final"  # TRAINER.DLRCLIP.HEAD, once the model is built
    per_step = True
    drop_last = False
    imagenet_templates = IMAGENET_TEMPLATES_SELECT

    @classmethod
    def needs_blocks(cls, cfg: Any) -> str:
        """Say whether the encoders are adapted; see BlocksNeeded."""
        cma = cls.read_settings(cfg).cma
        return "adapts both encoders (with TRAINER.DLRCLIP.CMA False only features are taken)" if cma else ""

    # Building

    def build_model(self) -> None:
        """Build CLIP, the network around it, and the optimizer of what is learnt; its schedule steps per batch."""
        settings = self.settings
        clip, classnames = self.load_frozen_clip(settings.prec)
        self.network = DLRCLIPNetwork(clip, classnames, self.templates(), settings)
        tell_alike(clip, classnames, self.network.zeroshot)
        self.main_head = settings.head
        self.loss_terms = tuple(self.network.loss_weights)
        self.selected = {}
        self._register()
        if settings.trains:
            self.keep_views()
        self._share_features(clip)

    def _register(self) -> None:
        """Register the learner with optimizer and schedule; where nothing is trained, an epoch is one empty step."""
        learner, cfg = self.network.learner, self.cfg
        self.tell_size(learner)
        if not self.settings.trains:
            self.max_epoch = 1
            items = self.dm.dataset.train_x
            self.train_loader_x = OneStep(items, lambda: torch.tensor([item.label for item in items]))
            self.register_model(self.model_name, learner, None, None)
            return
        optim = build_optimizer_with_eps(learner, cfg.OPTIM, self.settings.eps)
        sched = build_lr_scheduler(optim, count_steps(cfg.OPTIM, len(self.train_loader_x)))
        self.register_model(self.model_name, learner, optim, sched)

    def _share_features(self, clip: CLIP) -> None:
        """Let validation and test loaders read zero-shot features from the cache on disk, or fill it.

        Without an adapted branch, and unless corruptions of the images are wanted, features are all that is needed.
        """
        kind = PatchEncoder if self.network.learner.patch_blocks else ImageEncoder
        encoder = self._encoder = kind(clip, self.settings.prec, self._autocast)
        self._known: dict[str, KnownFeatures] = {}  # loaders that want features, by their names
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return  # each process then has only a part of the images
        for split in ("val", "test"):
            loader = getattr(self, f"{split}_loader")
            slot = feature_slot(self.cfg, encoder, loader, split)
            if self.network.learner.cma is None and self.network.learner.robust is None and loader is not None:
                setattr(self, f"{split}_loader", FeatureLoader(loader, encoder, slot))
            elif slot is not None:
                self._known[split] = KnownFeatures(loader, slot, split)
                setattr(self, f"{split}_loader", self._known[split])

    # One step

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Take what DLRCLIPNetwork takes, images [B, 3, H, W] or the frozen part of them, and the labels [B]."""
        inputs, labels = super().parse_batch_train(batch)
        if isinstance(inputs, FrozenPart):
            return {"images": None, "features": inputs.features, "hidden": inputs.hidden}, labels
        return {"images": inputs}, labels

    def run(self, inputs: Any, labels: Tensor) -> dict[str, Tensor]:
        """Return logits of all heads, alpha and w; see DLRCLIPNetwork."""
        outputs = self.network(**inputs)
        self._weight = outputs["weight"].detach()
        return outputs

    def loss(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the losses by name, each times its weight."""
        return self.network.losses(outputs, labels, self.class_loss)

    def shown_logits(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the main head, or of `final` where a step does not compute the main head."""
        return outputs[self.main_head if self.main_head in outputs else "final"]

    def after_update(self) -> None:
        """Add the step's w to the running mean of w."""
        self.network.learner.observe(self._weight)

    def watch(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return alpha and w, and the learnt scales that the step was computed with."""
        learner = self.network.learner
        inside: dict[str, Tensor] = {}
        for name in ("alpha", "weight"):
            if name in outputs:
                value = outputs[name].detach()
                inside |= {f"{name}/mean": value.mean(), f"{name}/min": value.min(), f"{name}/max": value.max()}
        if learner.glr is not None:
            inside["res_scale"] = learner.glr.res_scale.detach()
        if learner.cma is not None:
            inside |= {f"cma_scale/{name}": scale for name, scale in learner.cma.scales().items()}
        return inside

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Make one step, unless nothing is trained; see CLIPTrainer."""
        return {} if self._optims[self.model_name] is None else super().forward_backward(batch)

    # Evaluation

    def parse_batch_test(self, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Return images [B, 3, H, W], with what is known of their features, and labels [B], on the device."""
        known = batch.get("feature"), batch.get("place")
        if "img" not in batch:
            return GivenImages(None, *known), batch["label"].to(self.device)
        images, labels = super().parse_batch_test(batch)
        return GivenImages(images, *known), labels

    def model_heads(self, input: Tensor | GivenImages) -> dict[str, Tensor]:
        """Return logits [B, C] of all heads for images [B, 3, H, W]."""
        return self.model_report(input)["heads"]

    def model_report(self, input: Tensor | GivenImages) -> dict[str, dict[str, Tensor]]:
        """Return the heads, and what figures show beside them: alpha, w, trust, image features of each branch."""
        report = self._report(input)
        features = {name: value for name, value in report["features"].items() if name != "patches"}
        return {**report, "features": features}

    def _report(self, input: Tensor | GivenImages) -> dict[str, dict[str, Tensor]]:
        """Return what `DLRCLIPNetwork.report` does, and keep features that are wanted."""
        given = GivenImages(input) if isinstance(input, Tensor) else input
        with self._autocast():
            report = self.network.report(given.images, given.features)
        if given.place is not None:
            split, start = given.place
            self._known[split].keep(start, ImageFeatures(**report["features"]).frozen())
        return report

    def bind_classes(self, classnames: Sequence[str], class_indices: Sequence[int] | None = None) -> bool:
        """Set the class list that logits are for; return whether it is a part of the training classes.

        See DLRCLIPNetwork.bind.
        """
        self.network.bind(classnames, class_indices)
        return self.network.columns is not None

    # What is chosen after training: beta of the fused head, and the robust head

    def before_train(self) -> None:
        super().before_train()
        learner = self.network.learner
        if learner.classnames != self.network.classnames:
            raise ValueError(
                f"Expected to go on with the {len(learner.classnames)} classes of the checkpoint but got a dataset "
                f"with {len(self.network.classnames)} classes of which some differ"
            )

    def after_epoch(self) -> None:
        """Choose beta, and calibrate, before a checkpoint may be written, so that every checkpoint carries both."""
        done, freq = self.epoch + 1, self.cfg.TRAIN.CHECKPOINT_FREQ
        saves = done == self.max_epoch or (freq > 0 and done % freq == 0)
        if saves or self.cfg.TEST.FINAL_MODEL == "best_val":
            self.choose_beta()
            self.calibrate()
        super().after_epoch()

    def choose_beta(self) -> None:
        """Choose beta on the few-shot validation images, or take the mean learnt w where there are none."""
        learner = self.network.learner
        reason = self.no_validation()
        mean = float(learner.mean_weight())
        if reason:
            value, n, on = mean, 0, f"mean learnt w ({reason})"
        else:
            logits, labels = self._collect(self.val_loader)
            prefer = mean if self.settings.beta_ties == "weight" else 0.0
            beta = best_beta(logits["cma"], logits["glr"], labels, prefer=prefer)
            value, n, on = beta.value, len(labels), "val"
            self.write_scalar("val/fused_at_beta", beta.accuracy, self.epoch)
        learner.beta.fill_(value)
        learner.beta_n.fill_(n)
        self.selected = {"beta": {"value": value, "on": on, "n": n}}
        self.write_scalar("val/beta", value, self.epoch)
        logger.info("beta of the fused head: %.2f, from %s%s", value, on, f" ({n} images)" if n else "", extra=DETAIL)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Fit the mixture, or the robust head, where there is one."""
        if self.network.learner.mixture is not None:
            self._calibrate_mixture()
        if self.network.learner.robust is not None:
            self._calibrate_robust()

    def _calibrate_mixture(self) -> None:
        """Fit the prototype classifiers to the training images, and the mixture to the validation images."""
        self.set_model_mode("eval")
        network, items, views = self.network, self.dm.dataset.train_x, self.settings.mixture.views
        seed = self.seed_or_draw()
        loaders = [(self.plain_training_images(), 1)]
        if views:
            augmented = DatasetWrapper(self.cfg, items, transform=build_transform(self.cfg, is_train=True))
            loaders.append((self.in_order(SeededViews(augmented, views, seed)), views))
        with self._autocast():
            training = self._training_features(loaders)
            texts = {"clip": network.zeroshot}
            if network.learner.cma is not None:
                texts["cma"] = network.text_features()
        validation = None if self.no_validation() else all_reports(self.val_loader, self._report_and_labels)
        fit_mixture(network.learner, training, texts, validation, network.clip_logits)
        self.selected["mixture"] = self._mixture_choice()
        logger.info("Mixture: %s", self.selected["mixture"], extra=DETAIL)

    def _training_features(self, loaders: Sequence[tuple[DataLoader[Any], int]]) -> tuple[Branches, Tensor]:
        """Return the features [V, N, E] of the training images by branch, and the labels [N]; see `all_features`."""
        if self.network.learner.cma is not None:
            return all_features(loaders, self._branch_features)
        slots = [feature_slot(self.cfg, self._encoder, loader, "train") for loader, _ in loaders]
        known = [
            collect_features(loader, self._encoder, views, slot)
            for (loader, views), slot in zip(loaders, slots, strict=True)
        ]
        return self.network.split(torch.cat([part.values for part in known])).by_branch(), known[0].labels

    def _branch_features(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.network.image_features(batch["img"].to(self.device)).by_branch()

    def _report_and_labels(self, batch: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        given, labels = self.parse_batch_test(batch)
        return self._report(given), labels

    def _mixture_choice(self) -> dict[str, Any]:
        """Return the entry of `selected` for the mixture: the weight of each branch."""
        mixture = self.network.learner.mixture
        assert mixture is not None
        n = int(mixture.count)
        on = "val"
        if not n:
            on = "nothing (no validation set, no prototypes to weigh): zero-shot CLIP"
        elif bool(mixture.left_out):
            on = "training images, each left out in turn (no validation set)"
        return {"value": mixture.chosen(), "on": on, "n": n}

    def _calibrate_robust(self) -> None:
        """Fit the robust head to validation images as they are and corrupted.

        Without validation images the trust of the head stays 1/2. Training images cannot replace them: the adapted
        branch knows those, and is always right on them.
        """
        robust = self.network.learner.robust
        assert robust is not None
        loader = self.plain_training_images()
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        slot = None if parallel else feature_slot(self.cfg, self._encoder, loader, "train")
        robust.remember(collect_features(loader, self._encoder, slot=slot).values[0])
        if not self.no_validation():
            robust.fit(self._evidence())
        self.selected["robust"] = self._robust_choice()
        logger.info("Robust head: %s", self.selected["robust"], extra=DETAIL)

    def _evidence(self) -> list[Evidence]:
        """Return features, logits and labels of the validation images as they are, then under each corruption."""
        assert self.val_loader is not None
        self.set_model_mode("eval")
        normalized = "normalize" in self.cfg.INPUT.TRANSFORMS
        mean = torch.tensor(self.cfg.INPUT.PIXEL_MEAN if normalized else [0.0] * 3, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.cfg.INPUT.PIXEL_STD if normalized else [1.0] * 3, device=self.device).view(1, 3, 1, 1)
        groups: list[list[Evidence]] = [[] for _ in range(1 + len(SHIFTS))]
        for number, batch in enumerate(self.val_loader):
            images, labels = batch["img"].to(self.device), batch["label"].to(self.device)
            versions = [images, *((shifted(images * std + mean, name, number) - mean) / std for name in SHIFTS)]
            for group, version in zip(groups, versions, strict=True):
                report = self.model_report(version)
                heads = report["heads"]
                group.append(Evidence(report["features"]["clip"], heads["clip"], heads["final"], labels))
        return [Evidence(*(torch.cat(parts) for parts in zip(*group, strict=True))) for group in groups]

    def _robust_choice(self) -> dict[str, Any]:
        """Return the entry of `selected` for the robust head."""
        robust = self.network.learner.robust
        assert robust is not None
        n = int(robust.count)
        on = f"val as it is and under {len(SHIFTS)} corruptions" if n else "nothing (no validation set): trust 1/2"
        return {"value": robust.chosen(), "on": on, "n": n}

    # Checkpoints

    def after_load(self, checkpoint: Mapping[str, Any]) -> None:
        """Set the dataset's class list, and note in `selected` what the checkpoint's run had chosen."""
        learner = self.network.learner
        self.bind_classes(list(self.dm.dataset.classnames), class_indices(self.dm.dataset))
        beta, n = float(learner.coefficient()), int(learner.beta_n)
        unchosen = bool(torch.isnan(learner.beta))
        on = "val" if n else NOT_CHOSEN if unchosen else "mean learnt w (no validation set)"
        self.selected = {"beta": {"value": beta, "on": on, "n": n}}
        if learner.robust is not None:
            self.selected["robust"] = self._robust_choice()
        if learner.mixture is not None:
            self.selected["mixture"] = self._mixture_choice()
