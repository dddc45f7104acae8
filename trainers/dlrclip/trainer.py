"""The trainer DLRCLIP: reads the configuration, builds the network, and says what one step, one epoch and a report are.

It uses only what upstream Dassl offers; what the toolbox of this project offers beyond that (mixed precision with
gradient scaling, evaluation of several heads in one pass) is used where it is there and done without where it is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import os.path as osp
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint

from ..clip import check_backbone, load_clip, templates_for
from .config import HEADS, add_dlrclip_config, check_dlrclip_config
from .glr import best_beta
from .network import DLRCLIPNetwork, read_extra_state

logger = logging.getLogger(__name__)

MODEL_NAME = "dlrclip"  # folder of the checkpoints within a run's output folder
FACTS = {"backbone": "backbone", "weights_digest": "CLIP weights with sha256", "context": "the prompt context"}
NOT_CHOSEN = "mean learnt w (beta was not chosen)"


@TRAINER_REGISTRY.register()
class DLRCLIP(TrainerX):
    """Few-shot adaptation of CLIP by a cross-modal adapter and a gated logit refiner.

    What the engine may ask for beside the usual methods: `model_heads`, `main_head`, `reference_head`, `selected`,
    `bind_classes`.
    """

    network: DLRCLIPNetwork
    reference_head = "clip"

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
        if "WEIGHTS" not in cfg.MODEL.BACKBONE or "TEMPLATE" not in cfg.DATASET:
            raise ValueError(
                "Expected the configuration to have MODEL.BACKBONE.WEIGHTS and DATASET.TEMPLATE: call extend_cfg(cfg)"
            )
        if cfg.TRAINER.DLRCLIP.PREC == "fp16" and not self._own_toolbox:
            raise ValueError(
                "Expected TRAINER.DLRCLIP.PREC to be fp32, amp or bf16 but got fp16: "
                "this toolbox cannot scale gradients, which half precision needs"
            )
        templates_for(cfg.DATASET.NAME, cfg.DATASET.TEMPLATE)
        check_backbone(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS or None)

    @property
    def _own_toolbox(self) -> bool:
        """Whether the engine handles precision (and several heads) itself."""
        return callable(getattr(self, "set_precision", None))

    @property
    def main_head(self) -> str:
        """The head whose accuracy is the trainer's."""
        return self.cfg.TRAINER.DLRCLIP.HEAD

    # Building

    def build_model(self) -> None:
        """CLIP, the network around it, and the optimiser of what is learnt, stepped per batch."""
        cfg, node = self.cfg, self.cfg.TRAINER.DLRCLIP
        classnames = list(self.dm.dataset.classnames)
        if len(classnames) != self.num_classes:
            raise ValueError(
                f"Expected labels 0 to {len(classnames) - 1} for the {len(classnames)} class names of the training "
                f"images but got labels up to {self.num_classes - 1}"
            )
        self._set_up_precision(node.PREC)
        logger.info("Loading CLIP (backbone: %s)", cfg.MODEL.BACKBONE.NAME)
        # Without CUDA, fp16 autocasts to bfloat16: the backbone is then kept in bfloat16 too.
        precision = "bf16" if node.PREC == "fp16" and self.device.type != "cuda" else node.PREC
        clip = load_clip(
            cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS or None, precision=precision, device=self.device
        )
        size = (clip.image_size, clip.image_size)
        if tuple(cfg.INPUT.SIZE) != size:
            raise ValueError(f"Expected INPUT.SIZE to be {size} for {clip.name} but got {tuple(cfg.INPUT.SIZE)}")
        self.network = DLRCLIPNetwork(
            clip,
            classnames,
            templates_for(cfg.DATASET.NAME, cfg.DATASET.TEMPLATE),
            cma=node.CMA,
            glr=node.GLR,
            skd=node.SKD,
            context=node.TEXT_CTX_INIT,
            start=node.START,
            end=node.END,
            dim=node.DIM,
            scale=node.SCALE,
            glr_dim=node.GLR_DIM,
            res_scale=node.RES_SCALE,
            fixed_alpha=node.FIXED_ALPHA,
            fusion_dim=node.FUSION_DIM,
            fixed_weight=node.FIXED_WEIGHT,
            loss_weights={key.lower(): node.LOSS[key] for key in node.LOSS},
            kd_weight=node.LAMBDA,
            temperature=node.T,
            smoothing=node.SMOOTHING,
        )
        learner = self.network.learner
        logger.info("Parameters to learn: %s", f"{sum(p.numel() for p in learner.parameters()):,}")
        optim = build_optimizer(learner, cfg.OPTIM)
        for group in optim.param_groups:
            if "eps" in group:
                group["eps"] = node.EPS
        sched = build_lr_scheduler(optim, _per_step(cfg.OPTIM, len(self.train_loader_x)))
        self.register_model(MODEL_NAME, learner, optim, sched)
        self.selected = {}

    def _set_up_precision(self, prec: str) -> None:
        """`self._autocast` = a function that gives the context in which the forward pass runs."""
        self._autocast: Any = contextlib.nullcontext
        if self._own_toolbox:
            self.set_precision(prec)
            self._autocast = self.precision.autocast
        elif prec == "amp":
            logger.info("This toolbox cannot scale gradients: amp means bfloat16 here, which needs no scaling")
            self._autocast = lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)

    # One step

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """-> images [B, 3, H, W] and labels [B], on the device."""
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """One step -> loss, accuracy (percent) and each loss term, for the console and TensorBoard."""
        images, labels = self.parse_batch_train(batch)
        with self._autocast():
            outputs = self.network(images)
            terms = self.network.losses(outputs, labels)
            loss = torch.stack(list(terms.values())).sum()
        self.model_backward_and_update(loss)
        self.update_lr()  # the schedule counts steps
        head = self.main_head if self.main_head in outputs else "final"
        summary = {
            "loss": loss.detach(),
            "acc": compute_accuracy(outputs[head].detach(), labels)[0].squeeze(),
            **{name: value.detach() for name, value in terms.items()},
        }
        inside = self._inside(outputs)
        values = torch.stack([v.float() for v in (*summary.values(), *inside.values())]).tolist()  # one transfer
        step = self.epoch * len(self.train_loader_x) + self.batch_idx
        for name, value in zip(inside, values[len(summary) :], strict=True):
            self.write_scalar(f"train/{name}", value, step)
        return dict(zip(summary, values[: len(summary)], strict=True))

    def _inside(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to watch beside the losses: alpha and w, and the learnt scales."""
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

    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] -> logits [B, C] of all five heads."""
        with self._autocast():
            return self.network.heads(input)

    def bind_classes(self, classnames: Sequence[str], class_indices: Sequence[int] | None = None) -> bool:
        """Sets the class list that logits are for; True when it is a part of the training classes (see the network)."""
        self.network.bind(classnames, class_indices)
        return self.network.columns is not None

    def model_inference(self, input: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, C] of the main head."""
        return self.model_heads(input)[self.main_head]

    def test(self, split: str | None = None) -> float:
        """Evaluates a split; an engine that knows one head only is followed by a pass that reports the five."""
        result = super().test(split)
        if not self._own_toolbox:
            self._report_heads(split or self.cfg.TEST.SPLIT)
        return result

    @torch.no_grad()
    def _report_heads(self, split: str) -> None:
        use_val = split == "val" and self.val_loader is not None
        logits, labels = self._collect(self.val_loader if use_val else self.test_loader)
        for head in HEADS:
            accuracy = 100.0 * (logits[head].argmax(dim=1) == labels).float().mean().item()
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
        return {head: torch.cat([batch[head] for batch in batches]) for head in HEADS}, torch.cat(labels)

    # The coefficient beta of the fused head

    def before_train(self) -> None:
        super().before_train()
        learner = self.network.learner
        if learner.classnames != self.network.classnames:
            raise ValueError(
                f"Expected to go on with the {len(learner.classnames)} classes of the checkpoint but got a dataset "
                f"with {len(self.network.classnames)} classes of which some differ"
            )

    def after_epoch(self) -> None:
        """Chooses beta before a checkpoint may be written, so that every checkpoint carries one."""
        done, freq = self.epoch + 1, self.cfg.TRAIN.CHECKPOINT_FREQ
        saves = done == self.max_epoch or (freq > 0 and done % freq == 0)
        if saves or self.cfg.TEST.FINAL_MODEL == "best_val":
            self.choose_beta()
        super().after_epoch()

    def choose_beta(self) -> None:
        """Chooses beta on the few-shot validation images; without such images it is the mean learnt w."""
        learner = self.network.learner
        reason = self._no_validation()
        mean = float(learner.mean_weight())
        if reason:
            value, n, on = mean, 0, f"mean learnt w ({reason})"
        else:
            logits, labels = self._collect(self.val_loader)
            beta = best_beta(logits["cma"], logits["glr"], labels, prefer=mean)
            value, n, on = beta.value, len(labels), "val"
            self.write_scalar("val/fused_at_beta", beta.accuracy, self.epoch)
        learner.beta.fill_(value)
        learner.beta_n.fill_(n)
        self.selected = {"beta": {"value": value, "on": on, "n": n}}
        self.write_scalar("val/beta", value, self.epoch)
        logger.info("beta of the fused head: %.2f, from %s%s", value, on, f" ({n} images)" if n else "")

    def _no_validation(self) -> str:
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
        path = _checkpoint_path(directory, epoch)
        checkpoint = load_checkpoint(path)
        state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
        if not isinstance(state, Mapping) or "_extra_state" not in state:
            raise ValueError(f"Expected a checkpoint of DLRCLIP but got something else: {path}")
        learner = self.network.learner
        facts = read_extra_state(state["_extra_state"])["facts"]
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
        logger.info("Loaded %s (epoch %s)", path, checkpoint.get("epoch"))


def _per_step(optim_cfg: Any, num_batches: int) -> Any:
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


def _checkpoint_path(directory: str | os.PathLike[str], epoch: int | None) -> str:
    folder = osp.join(directory, MODEL_NAME)
    if epoch is not None:
        name = f"model.pth.tar-{epoch}"
    else:
        name, pointer = "model-best.pth.tar", osp.join(folder, "checkpoint")
        if not osp.exists(osp.join(folder, name)):
            if not osp.exists(pointer):
                raise FileNotFoundError(f"Expected a checkpoint of DLRCLIP in {folder} but there is none")
            with open(pointer, encoding="utf-8") as file:
                name = osp.basename(file.readline().strip()) or name
    path = osp.join(folder, name)
    if not osp.exists(path):
        raise FileNotFoundError(f"Expected a checkpoint at {path} but there is none")
    return path
