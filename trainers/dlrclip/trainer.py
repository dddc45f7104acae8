"""The trainer DLRCLIP: reads the configuration, builds the network, and says what one step, one epoch and a report are.

It uses only what upstream Dassl offers; what the toolbox of this project offers beyond that (mixed precision with
gradient scaling, evaluation of several heads in one pass) is used where it is there and done without where it is not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dassl.data import DatasetWrapper
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler
from dassl.utils import load_checkpoint

from ..clip import CLIP, IMAGENET_TEMPLATES_SELECT
from ..clip.features import ImageEncoder, KnownFeatures, collect_features
from ..common import CLIPTrainer, build_optimizer_with_eps, checkpoint_path, count_steps, sent
from ..feature_slot import feature_slot
from ..learner import FACTS, unpack_record
from .config import add_dlrclip_config, check_dlrclip_config
from .glr import best_beta
from .network import DLRCLIPNetwork, FrozenPart
from .pseudo_shifts import SHIFTS, shifted
from .robust import Evidence
from .views import GIB, ViewLoader

logger = logging.getLogger(__name__)

MODEL_NAME = "dlrclip"  # folder of the checkpoints within a run's output folder
NOT_CHOSEN = "mean learnt w (beta was not chosen)"


class GivenImages(NamedTuple):
    """Test images [B, 3, H, W]; zero-shot features [B, E] where they are known, else what takes them."""

    images: Tensor
    features: Tensor | None = None
    keep: Callable[[Tensor], None] | None = None


@TRAINER_REGISTRY.register()
class DLRCLIP(CLIPTrainer):
    """Few-shot adaptation of CLIP by a cross-modal adapter and a gated logit refiner.

    What the engine may ask for beside the usual methods: `model_heads`, `model_report`, `main_head`, `reference_head`,
    `selected`, `bind_classes`.
    """

    network: DLRCLIPNetwork
    recipe = 2
    node_name = "DLRCLIP"
    drop_last = False
    imagenet_templates = IMAGENET_TEMPLATES_SELECT

    # Configuration

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.DLRCLIP to `cfg` unless it is there."""
        add_dlrclip_config(cfg)

    def check_cfg(self, cfg: Any) -> None:
        """Checks all that can be checked before data and CLIP are loaded.

        Raises:
            ValueError: a key of TRAINER.DLRCLIP or a backbone that does not exist.
            FileNotFoundError: the backbone's weights are not there.
        """
        check_dlrclip_config(cfg)
        self.check_clip_cfg(cfg)

    @property
    def main_head(self) -> str:  # type: ignore[override]  # read from the configuration, never set
        """The head whose accuracy is the trainer's."""
        return self.cfg.TRAINER.DLRCLIP.HEAD

    # Building

    def build_model(self) -> None:
        """CLIP, the network around it, and the optimiser of what is learnt, stepped per batch."""
        cfg, node = self.cfg, self.cfg.TRAINER.DLRCLIP
        clip, classnames = self.load_frozen_clip(node.PREC)
        self.network = DLRCLIPNetwork(
            clip,
            classnames,
            self.templates(),
            cma=node.CMA,
            glr=node.GLR,
            skd=node.SKD,
            context=node.TEXT_CTX_INIT,
            start=node.START,
            end=node.END,
            dim=node.DIM,
            scale=node.SCALE,
            learn_scale=node.LEARN_SCALE,
            grad_scaling=node.GRAD_SCALING,
            shared=node.GLR_MODE == "shared",
            glr_dim=node.GLR_DIM if node.GLR_MODE == "dense" else node.SHARED_DIM,
            res_scale=node.RES_SCALE,
            fixed_alpha=node.FIXED_ALPHA,
            fusion_dim=node.FUSION_DIM,
            fixed_weight=node.FIXED_WEIGHT,
            robust=node.FUSION == "robust",
            loss_weights={key.lower(): node.LOSS[key] for key in node.LOSS},
            kd_weight=node.LAMBDA,
            temperature=node.T,
            smoothing=node.SMOOTHING,
            text_chunk=node.TEXT_CHUNK,
            checkpointing=node.CHECKPOINTING,
            compile=node.COMPILE,
        )
        self.loss_terms = tuple(self.network.loss_weights)
        learner = self.network.learner
        logger.info("Parameters to learn: %s", f"{sum(p.numel() for p in learner.parameters()):,}")
        optim = build_optimizer_with_eps(learner, cfg.OPTIM, node.EPS)
        sched = build_lr_scheduler(optim, count_steps(cfg.OPTIM, len(self.train_loader_x)))
        self.register_model(MODEL_NAME, learner, optim, sched)
        self.selected = {}
        self._keep_views()
        self._share_features(clip)

    def _keep_views(self) -> None:
        """With INPUT.VIEWS, training batches carry what the frozen blocks make of the images, instead of images."""
        cfg, loader, items = self.cfg, self.train_loader_x, self.dm.dataset.train_x
        views = int(cfg.INPUT.get("VIEWS", 0))
        self._views: ViewLoader | None = None
        if not views or not items:  # built without images, to predict
            return
        seed = cfg.SEED if cfg.SEED >= 0 else int(torch.randint(2**31, (1,)))
        budget = cfg.INPUT.VIEWS_MEMORY * GIB
        self._views = ViewLoader(loader, items, self._frozen_part, views, seed, budget, self.output_dir, self.device)
        self.train_loader_x: Any = self._views

    def _share_features(self, clip: CLIP) -> None:
        """Zero-shot features of validation and test images come from the cache on disk, or go there."""
        encoder = self._encoder = ImageEncoder(clip, self.cfg.TRAINER.DLRCLIP.PREC, self._autocast)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return  # each process then has a part of the images
        for split in ("val", "test"):
            loader = getattr(self, f"{split}_loader")
            slot = feature_slot(self.cfg, encoder, loader, split)
            if slot is not None:
                setattr(self, f"{split}_loader", KnownFeatures(loader, slot))

    def _frozen_part(self, images: Tensor) -> FrozenPart:
        with self._autocast():
            return self.network.frozen_part(images.to(self.device))

    # One step

    def before_epoch(self) -> None:
        """Has the views follow the epoch."""
        super().before_epoch()
        if self._views is not None:
            self._views.set_epoch(self.epoch)

    def after_train(self) -> None:
        """Gives the room of the views back, and tests."""
        if self._views is not None:
            self._views.close()
        super().after_train()

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """One step -> loss, accuracy (percent) and each loss term, for the console and TensorBoard."""
        images: Tensor | None = None
        if "img" in batch:
            images, labels = self.parse_batch_train(batch)
        else:  # the frozen part of the images, see INPUT.VIEWS
            labels = batch["label"].to(self.device, non_blocking=True)
        with self._autocast():
            outputs = self.network(images, features=batch.get("feature"), hidden=batch.get("hidden"))
            terms = self.network.losses(outputs, labels)
            loss = torch.stack(list(terms.values())).sum()
        self._weight = outputs["weight"].detach()
        head = self.main_head if self.main_head in outputs else "final"
        summary = {
            "loss": loss.detach(),
            "acc": compute_accuracy(outputs[head].detach(), labels)[0].squeeze(),
            **{name: value.detach() for name, value in terms.items()},
        }
        inside = self._inside(outputs)
        numbers = sent([*summary.values(), *inside.values()])
        self.model_backward_and_update(loss)
        self.update_lr()  # the schedule counts steps
        values = numbers()
        step = self.epoch * len(self.train_loader_x) + self.batch_idx
        for name, value in zip(inside, values[len(summary) :], strict=True):
            self.write_scalar(f"train/{name}", value, step)
        return dict(zip(summary, values[: len(summary)], strict=True))

    def after_update(self) -> None:
        """Take the step's w into its running mean."""
        self.network.learner.observe(self._weight)

    def _inside(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to watch beside the losses: alpha and w, and the learnt scales that the step was computed with."""
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

    # Evaluation

    def parse_batch_test(self, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """-> images [B, 3, H, W], with what is known of them, and labels [B], on the device."""
        images, labels = super().parse_batch_test(batch)
        return GivenImages(images, batch.get("feature"), batch.get("keep")), labels

    def model_heads(self, input: Tensor | GivenImages) -> dict[str, Tensor]:
        """Images [B, 3, H, W] -> logits [B, C] of all heads."""
        return self.model_report(input)["heads"]

    def model_report(self, input: Tensor | GivenImages) -> dict[str, dict[str, Tensor]]:
        """The heads with what figures show beside them: alpha, w, trust and image features of each branch."""
        given = GivenImages(input) if isinstance(input, Tensor) else input
        with self._autocast():
            report = self.network.report(given.images, given.features)
        if given.keep is not None:
            given.keep(report["features"]["clip"])
        return report

    def bind_classes(self, classnames: Sequence[str], class_indices: Sequence[int] | None = None) -> bool:
        """Sets the class list that logits are for; True when it is a part of the training classes (see the network)."""
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
        """Chooses what is to be chosen before a checkpoint may be written, so that every checkpoint carries it."""
        done, freq = self.epoch + 1, self.cfg.TRAIN.CHECKPOINT_FREQ
        saves = done == self.max_epoch or (freq > 0 and done % freq == 0)
        if saves or self.cfg.TEST.FINAL_MODEL == "best_val":
            self.choose_beta()
            self.calibrate()
        super().after_epoch()

    def choose_beta(self) -> None:
        """Chooses beta on the few-shot validation images; without such images it is the mean learnt w."""
        learner = self.network.learner
        reason = self.no_validation()
        mean = float(learner.mean_weight())
        if reason:
            value, n, on = mean, 0, f"mean learnt w ({reason})"
        else:
            logits, labels = self._collect(self.val_loader)
            prefer = mean if self.cfg.TRAINER.DLRCLIP.BETA_TIES == "weight" else 0.0
            beta = best_beta(logits["cma"], logits["glr"], labels, prefer=prefer)
            value, n, on = beta.value, len(labels), "val"
            self.write_scalar("val/fused_at_beta", beta.accuracy, self.epoch)
        learner.beta.fill_(value)
        learner.beta_n.fill_(n)
        self.selected = {"beta": {"value": value, "on": on, "n": n}}
        self.write_scalar("val/beta", value, self.epoch)
        logger.info("beta of the fused head: %.2f, from %s%s", value, on, f" ({n} images)" if n else "")

    @torch.no_grad()
    def calibrate(self) -> None:
        """Fits the robust head, where there is one, to validation images as they are and corrupted.

        Without such images its trust stays 1/2: on training images, which it knows, the adapted branch is always right.
        """
        robust = self.network.learner.robust
        if robust is None:
            return
        transform = build_transform(self.cfg, is_train=False)
        loader = self.in_order(DatasetWrapper(self.cfg, self.dm.dataset.train_x, transform=transform))
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        slot = None if parallel else feature_slot(self.cfg, self._encoder, loader, "train")
        robust.remember(collect_features(loader, self._encoder, slot=slot).values[0])
        if not self.no_validation():
            robust.fit(self._evidence())
        self.selected["robust"] = self._robust_choice()
        logger.info("Robust head: %s", self.selected["robust"])

    def _evidence(self) -> list[Evidence]:
        """The validation images as they are, and under each corruption."""
        assert self.val_loader is not None
        self.set_model_mode("eval")
        normalised = "normalize" in self.cfg.INPUT.TRANSFORMS
        mean = torch.tensor(self.cfg.INPUT.PIXEL_MEAN if normalised else [0.0] * 3, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.cfg.INPUT.PIXEL_STD if normalised else [1.0] * 3, device=self.device).view(1, 3, 1, 1)
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
        """What `selected` says of the robust head."""
        robust = self.network.learner.robust
        assert robust is not None
        n = int(robust.count)
        on = f"val as it is and under {len(SHIFTS)} corruptions" if n else "nothing (no validation set): trust 1/2"
        return {"value": robust.chosen(), "on": on, "n": n}

    # Checkpoints

    def load_model(self, directory: str | os.PathLike[str], epoch: int | None = None) -> None:
        """Loads what an earlier run learnt; its dataset may be another one.

        Args:
            directory: output folder of that run; empty: nothing is loaded.
            epoch: the checkpoint after that many epochs; None: the best one, or the latest where none was called best.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: it was made by something else, or with another CLIP, prompt or architecture.
        """
        if not directory:
            logger.info("load_model() is skipped: no model folder is given")
            return
        path = checkpoint_path(directory, MODEL_NAME, epoch, "DLRCLIP")
        checkpoint = load_checkpoint(path)
        state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
        if not isinstance(state, Mapping) or "_extra_state" not in state:
            raise ValueError(f"Expected a checkpoint of DLRCLIP but got something else: {path}")
        learner = self.network.learner
        facts = {"glr_mode": "dense", **unpack_record(state["_extra_state"])["facts"]}  # once there was no other
        for name, ours in learner.facts.items():
            if name in facts and facts[name] != ours:
                raise ValueError(f"Expected a checkpoint for {FACTS[name]} {ours!r} but got {facts[name]!r}: {path}")
        missing, unexpected = sorted(learner.state_dict().keys() - state), sorted(state.keys() - learner.state_dict())
        if missing or unexpected:
            raise ValueError(
                "Expected a checkpoint with the same switches, blocks and fixed weights as TRAINER.DLRCLIP but it "
                f"lacks {missing[:3]} and has {unexpected[:3]} beside (the first three of each): {path}"
            )
        try:
            learner.load_state_dict(state)
        except RuntimeError as error:  # the sizes of the layers
            raise ValueError(f"Expected a checkpoint that fits TRAINER.DLRCLIP but got {path}: {error}") from error
        self.bind_classes(list(self.dm.dataset.classnames), getattr(self.dm.dataset, "class_indices", None))
        beta, n = float(learner.coefficient()), int(learner.beta_n)
        unchosen = bool(torch.isnan(learner.beta))
        on = "val" if n else NOT_CHOSEN if unchosen else "mean learnt w (no validation set)"
        self.selected = {"beta": {"value": beta, "on": on, "n": n}}
        if learner.robust is not None:
            self.selected["robust"] = self._robust_choice()
        logger.info("Loaded %s (epoch %s)", path, checkpoint.get("epoch"))
