"""The trainer classes that methods derive from: one labeled loader (TrainerX), or one more without labels (TrainerXU).

What a subclass may offer beyond upstream's methods stands in declared.py, with its defaults.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dassl.data import DataManager
from dassl.data.data_manager import data_digest, dataset_of
from dassl.data.loaders import share_of
from dassl.engine.checkpointing.resume import batches_from, check_config, check_data, check_recipe
from dassl.engine.reliability.finite import KeptBuffers, report
from dassl.evaluation import build_evaluator
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.upstream_names import upstream_name
from dassl.utils import InputError, count_num_param, distributed, load_pretrained_weights, stopping
from dassl.utils.logger import DETAIL, ensure_heard

from .base import TrainerBase
from .environment import why_no_gpu
from .evaluating import EvaluatingTrainer
from .hooks import HookBase, build_hooks
from .hooks.losses import WHAT_HELPS, as_numbers, fault_of
from .net import SimpleNet
from .parallel import copy_from_main, own_draws
from .state import EpochStats, count_images
from .trackers import check_logger

logger = logging.getLogger(__name__)

__all__ = ["SimpleNet", "SimpleTrainer", "TrainerBase", "TrainerX", "TrainerXU"]

NUM_EXAMPLES = 8  # test images shown in TensorBoard


class SimpleTrainer(EvaluatingTrainer):
    """Build data, model, evaluator and hooks from a config; TrainerX and TrainerXU say how batches are drawn.

    Args:
        cfg: the frozen configuration.
        data: the data manager, or a stand-in with the same attributes; None: one is made from the configuration.
        hooks: the hooks of the run; None: those of ``build_hooks``, which write the run's files.

    Attributes:
        drop_last: whether a training epoch leaves out its last, smaller batch; a method may say otherwise.
    """

    drop_last = True

    def __init__(self, cfg: Any, data: Any = None, hooks: Sequence[HookBase] | None = None) -> None:
        super().__init__()
        ensure_heard()
        self.check_cfg(cfg)
        self._check_run_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        if cfg.USE_CUDA and cfg.VERBOSE and self.device.type == "cpu" and distributed.is_main():
            logger.warning("Computing on the CPU: %s (USE_CUDA False says that this is meant)", why_no_gpu())
        if distributed.active() and self.device.type == "cuda":
            self.device = torch.device("cuda", distributed.local_rank())
        self.start_epoch = self.epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.output_dir = cfg.OUTPUT_DIR
        self.cfg = cfg
        self.best_result = -math.inf
        self._data = data

        with distributed.main_first():  # splits, picks and rendered images are made by one process
            self.build_data_loader()
        self._check_same_data()
        self._check_data()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)
        self.register_hooks(self.build_hooks() if hooks is None else hooks)

    # ---- set-up

    def check_cfg(self, cfg: Any) -> None:
        """Raise when the config does not suit the method; called before anything is built."""
        self.check_settings(cfg)

    @staticmethod
    def _check_run_cfg(cfg: Any) -> None:
        for key, value, allowed in (
            ("TEST.FINAL_MODEL", cfg.TEST.FINAL_MODEL, ("last_step", "best_val")),
            ("TEST.SPLIT", cfg.TEST.SPLIT, ("test", "val")),
            ("TRAIN.ON_NAN", cfg.TRAIN.ON_NAN, ("stop", "skip")),
            ("TRAIN.COUNT_ITER", cfg.TRAIN.COUNT_ITER, ("train_x", "train_u", "smaller_one")),
        ):
            if value not in allowed:
                raise InputError(f'Expected {key} to be one of {", ".join(allowed)} but got "{value}"')
        check_logger(cfg.LOGGER)
        for key, value, least in (
            ("OPTIM.MAX_EPOCH", cfg.OPTIM.MAX_EPOCH, 0),
            ("TRAIN.PRINT_FREQ", cfg.TRAIN.PRINT_FREQ, 1),
            ("TRAIN.ON_NAN_LIMIT", cfg.TRAIN.ON_NAN_LIMIT, 1),
            ("TRAIN.CHECKPOINT_STEPS", cfg.TRAIN.CHECKPOINT_STEPS, 0),
            ("TRAIN.CHECKPOINT_MINUTES", cfg.TRAIN.CHECKPOINT_MINUTES, 0),
            ("TRAIN.CHECKPOINTS_KEPT", cfg.TRAIN.CHECKPOINTS_KEPT, 1),
            ("TEST.PREDICTIONS_MB", cfg.TEST.PREDICTIONS_MB, 0),
        ):
            if value < least:
                raise InputError(f"Expected {key} to be at least {least} but got {value}")
        if not cfg.OUTPUT_DIR:
            raise InputError("Expected OUTPUT_DIR to be a folder but got an empty string")

    def _check_data(self) -> None:
        """Check that the splits that every use of this config needs are there, before the model is built."""
        if not self.cfg.TEST.NO_TEST:
            self._loader_of(self.cfg.TEST.SPLIT, f"TEST.SPLIT {self.cfg.TEST.SPLIT}")

    def _check_training_data(self) -> None:
        """Check that the splits that only training needs are there.

        So a best_val run can be evaluated elsewhere without a validation set there.
        """
        if self.cfg.TEST.FINAL_MODEL == "best_val" and not self.cfg.TEST.NO_TEST:
            self._loader_of("val", "TEST.FINAL_MODEL best_val")

    def _check_same_data(self) -> None:
        if distributed.world_size() == 1:
            return
        sums = []
        for split in ("train_x", "train_u", "val", "test"):
            total = 0
            for item in getattr(dataset_of(self.dm), split, None) or ():
                name = f"{os.path.basename(item.impath)} {item.label}"  # folders may differ between machines
                total = zlib.crc32(name.encode("utf-8", "surrogateescape"), total)
            sums.append(total)
        distributed.check_same("images and labels", sums)

    def build_data_loader(self) -> None:
        """Take over what the data manager offers; make a data manager if the trainer was given none."""
        dm = DataManager(self.cfg, drop_last=self.drop_last) if self._data is None else self._data
        self.train_loader_x = dm.train_loader_x
        self.train_loader_u = dm.train_loader_u  # None when there is no such data; so is val_loader
        self.val_loader = dm.val_loader
        self.test_loader = dm.test_loader
        self.num_classes = dm.num_classes
        self.num_source_domains = dm.num_source_domains
        self.lab2cname = dm.lab2cname
        self.dm = dm

    def build_model(self) -> None:
        """Build and register the model with its optimizer and scheduler; the default is a SimpleNet."""
        cfg = self.cfg
        logger.info("Building model")
        self.model = SimpleNet(cfg, cfg.MODEL, self.num_classes)
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(self.model, cfg.MODEL.INIT_WEIGHTS)
        self.model.to(self.device)
        logger.info("# params: %s", f"{count_num_param(self.model):,}")
        self.optim = build_optimizer(self.model, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("model", self.model, self.optim, self.sched)

    def build_hooks(self) -> list[HookBase]:
        """Build the hooks of a run, in order; a subclass may add its own."""
        return build_hooks(self.cfg)

    # ---- training

    def train(self) -> None:  # type: ignore[override]  # upstream's signature
        """Train from start_epoch to OPTIM.MAX_EPOCH, resuming if OUTPUT_DIR (or RESUME) holds checkpoints; test."""
        self._check_training_data()
        found = self._find_checkpoint(Path(self.cfg.RESUME or self.cfg.OUTPUT_DIR))
        if found is not None:
            check_data(found, data_digest(self.dm))  # before anything of that run is written over
            check_recipe(found, self.recipe, self.cfg)
            check_config(found, self.cfg)
        super().train(self.start_epoch, self.max_epoch)

    @classmethod
    def trains(cls, cfg: Any) -> bool:
        """Return whether the class says how to train, by forward_backward or by the whole of run_epoch."""
        return cls.forward_backward is not TrainerBase.forward_backward or cls.run_epoch is not SimpleTrainer.run_epoch

    def before_train(self) -> None:
        """Resume if possible, and open TensorBoard's event file."""
        self.begin_records()
        self.time_start = time.time()
        self.call_hooks("before_train")
        distributed.check_same("the epoch that checkpoints go on with", (self.start_epoch, self.progress.step))

    def after_epoch(self) -> None:
        """Evaluate on val and keep the best model if configured; save a checkpoint when one is due.

        Before that, all processes take over rank 0's models and choices. What a method has chosen on validation images
        is then the same for all, however their GPUs round.
        """
        copy_from_main(self._models.values())
        self.selected = distributed.broadcast_object(self.selected)
        self.call_hooks("after_epoch")

    def after_train(self) -> None:
        """Test the final model unless TEST.NO_TEST."""
        logger.info("Finish training", extra=DETAIL)
        self.call_hooks("after_train")
        if self.time_start is not None:  # a subclass may have replaced before_train
            elapsed = round(time.time() - self.time_start)
            logger.info("Elapsed: %s", datetime.timedelta(seconds=elapsed))
        self.close_writer()

    def run_epoch(self) -> None:
        """Make one pass over the training batches, with one step for each."""
        self.set_model_mode("train")
        self.stats = EpochStats()
        self.num_batches = self.count_batches()
        if hasattr(self.dm, "set_epoch"):  # a subclass may bring another data manager
            self.dm.set_epoch(self.epoch)  # the order of the batches depends on seed and epoch, so resuming keeps it
        self.progress.check_length(self.num_batches)
        first = self.steps_done = self.progress.step
        self.batch_idx = max(first - 1, 0)
        shared = share_of(self.train_loader_x, 0) is not None
        kept = KeptBuffers() if self.cfg.TRAIN.ON_NAN == "skip" else None
        with stopping.postponed(), own_draws() if shared else contextlib.nullcontext():
            for self.batch_idx, batches in enumerate(self.train_batches(), first):  # noqa: B020
                self.stats.batches = batches
                self.share = share_of(self.train_loader_x, self.batch_idx)
                self.call_hooks("before_step")
                self.guard.begin()
                if kept is not None:
                    kept.keep(self._models.values())
                summary = as_numbers(self.forward_backward(*batches))
                if kept is not None and self.guard.fault:
                    kept.put_back()
                self.stats.summary, self.stats.images = self._of_all(summary, count_images(batches))
                self.call_hooks("after_step")
                self.steps_done = self.batch_idx + 1
                self.call_hooks("between_steps")
        self.share = None
        self.guard.end()

    def _of_all(self, summary: dict[str, float], images: int) -> tuple[dict[str, float], int]:
        """Return the whole batch's means and number of images, given those of this process's part."""
        if self.share is None or distributed.world_size() == 1:
            return summary, images
        size = self.share.size
        values = [size, images if size else 0, *(size * value for value in summary.values())]
        total = distributed.all_reduce_sum(torch.tensor(values, dtype=torch.float64)).tolist()
        means = (value / total[0] for value in total[2:])
        return dict(zip(summary, means, strict=True)), round(total[1])

    def _skipped(self) -> None:
        """Go on with a resumed run, now that the batches that it has seen are skipped."""
        self.progress.go_on(self.stats)

    def count_batches(self) -> int:
        """Return the number of steps in an epoch: the batches of train_loader_x."""
        return len(self.train_loader_x)

    def train_batches(self) -> Iterator[tuple[Any, ...]]:
        """Yield the arguments of forward_backward, step by step, for the rest of one epoch (see ``batches_from``)."""
        raise NotImplementedError

    def dry_run(self) -> None:
        """Run one training step and one test batch, to see that everything fits; save nothing."""
        self._check_training_data()
        if self.has_training_step():
            self.set_model_mode("train")
            self.batch_idx, self.num_batches = 0, self.count_batches()
            batches = next(iter(self.train_batches()))
            self.stats.batches = batches
            self.guard.begin()
            summary = as_numbers(self.forward_backward(*batches))
            fault = fault_of(self, summary)
            if fault:
                raise report(self, fault, "nothing is saved", summary, WHAT_HELPS)
            self.guard.end()
            logger.info("One training batch: %s", " ".join(f"{k} {v:.4f}" for k, v in summary.items()))
        split = self.cfg.TEST.SPLIT
        self.set_model_mode("eval")
        with torch.no_grad():
            heads, labels = self._infer(next(iter(self._loader_of(split, "dry run"))))
        logger.info("One %s batch of %d: logits of %s", split, len(labels), ", ".join(heads))
        logger.info("Dry run: OK")

    # ---- evaluation

    def model_inference(self, input: Any) -> Any:
        """Return logits [B, C] for a test input."""
        return self.model(input)

    def parse_batch_test(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and labels on the device.

        From pinned memory, the program does not wait for the copy.
        """
        return batch["img"].to(self.device, non_blocking=True), batch["label"].to(self.device, non_blocking=True)


class TrainerX(SimpleTrainer):
    """Train on labeled batches: ``forward_backward(batch)``."""

    def train_batches(self) -> Iterator[tuple[Any, ...]]:
        """Yield each labeled batch."""
        for batch in batches_from(self.train_loader_x, self.progress.step, self._skipped):
            yield (batch,)

    def parse_batch_train(self, batch: Any) -> Any:
        """Return images, labels and domains on the device."""
        images, labels, domains = (batch[key].to(self.device, non_blocking=True) for key in ("img", "label", "domain"))
        return images, labels, domains


class TrainerXU(SimpleTrainer):
    """Train on pairs of a labeled and an unlabeled batch: ``forward_backward(batch_x, batch_u)``."""

    def _check_training_data(self) -> None:
        super()._check_training_data()
        if self.train_loader_u is None:
            raise InputError(f"Expected unlabeled data (train_u) but {self.cfg.DATASET.NAME} has none")
        for loader in (self.train_loader_x, self.train_loader_u):
            share = share_of(loader, 0)
            # One weight cannot serve two parts of different sizes.
            if share is not None and len(set(share.counts)) > 1:
                raise InputError(
                    "Expected labeled and unlabeled batches to be divisible by the number of processes, "
                    f"{len(share.counts)}, but got a batch of {share.total}"
                )

    def count_batches(self) -> int:
        """Return the number of steps in an epoch: that of the loader TRAIN.COUNT_ITER names, or the smaller one."""
        steps_x, steps_u = len(self.train_loader_x), len(self.train_loader_u or ())
        return {"train_x": steps_x, "train_u": steps_u, "smaller_one": min(steps_x, steps_u)}[self.cfg.TRAIN.COUNT_ITER]

    def train_batches(self) -> Iterator[tuple[Any, ...]]:
        """Yield pairs of batches; the loader that runs out first starts again."""
        count, first = self.count_batches(), self.progress.step
        stream_u = batches_from(self.train_loader_u, first, lambda: None, endless=True)
        stream_x = batches_from(self.train_loader_x, first, self._skipped, endless=True)
        for _ in range(first, count):
            yield next(stream_x), next(stream_u)

    def parse_batch_train(self, batch_x: Any, batch_u: Any) -> Any:  # type: ignore[override]  # upstream's signature
        """Return labeled images, their labels and unlabeled images, on the device."""
        both = ((batch_x, "img"), (batch_x, "label"), (batch_u, "img"))
        images, labels, unlabeled = (batch[key].to(self.device, non_blocking=True) for batch, key in both)
        return images, labels, unlabeled


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)
