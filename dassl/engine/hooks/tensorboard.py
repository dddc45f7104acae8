"""Write a run's event files for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dassl.evaluation.drawing import Picture
from dassl.evaluation.figures import confusion_image, examples_image
from dassl.evaluation.passes import Evaluation

from .base import HookBase

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

# Tags begin with it that have one value each, after training. TensorBoard sorts groups of tags by name: this one comes
# behind the curves, which begin with "train" and "val".
WHEN_DONE = "when_done/"


def group_of(phase: str) -> str:
    """Return how the tags of a test begin that is made in that phase of a run."""
    return WHEN_DONE if phase == "final" else ""


class TensorBoard(HookBase):
    """Write curves and pictures to TensorBoard.

    Losses, learning rate and speed are written per step, all heads per evaluation, pictures and hyper-parameters at the
    end.
    """

    def before_train(self, trainer: SimpleTrainer) -> None:
        steps = trainer.count_batches() if trainer.start_epoch else 0
        trainer.init_writer(Path(trainer.output_dir) / "tensorboard", purge_step=trainer.start_epoch * steps or None)

    def after_step(self, trainer: SimpleTrainer) -> None:
        stats, step = trainer.stats, trainer.global_step
        for name, meter in stats.losses.meters.items():
            trainer.write_scalar(f"train/{name}", meter.avg, step)
        trainer.write_scalar("train/lr", stats.lr, step)
        if stats.batch_time.val > 0:
            trainer.write_scalar("train/images_per_second", stats.images / stats.batch_time.val, step)

    def after_test(self, trainer: SimpleTrainer, evaluation: Evaluation) -> None:
        for head, values in evaluation.heads.items():
            for name, value in values.items():
                trainer.write_scalar(f"{group_of(trainer.phase)}{evaluation.split}/{head}/{name}", value, trainer.epoch)
        if trainer.writer is not None and trainer.phase == "final":
            self._pictures(trainer, evaluation)

    @staticmethod
    def _pictures(trainer: SimpleTrainer, evaluation: Evaluation) -> None:
        names, pictures = trainer.lab2cname, {"mistakes": evaluation.mistakes_picture}
        if evaluation.confusion is not None:
            title = f"{evaluation.split}, head {evaluation.main}"
            pictures["confusion_matrix"] = Picture(confusion_image(evaluation.confusion, names, title))
        if evaluation.examples:
            image = examples_image(evaluation.examples, names, evaluation.main, trainer.reference_head)
            pictures["examples"] = Picture(image)
        for name, picture in pictures.items():
            if picture is not None:
                trainer.writer.add_picture(f"{WHEN_DONE}{evaluation.split}/{name}", picture, trainer.epoch)

    def after_train(self, trainer: SimpleTrainer) -> None:
        evaluation = trainer.evaluation
        if trainer.writer is None or evaluation is None:
            return
        tags = [f"{WHEN_DONE}{evaluation.split}/{head}/accuracy" for head in evaluation.heads]
        trainer.writer.add_hparams(hyper_parameters(trainer.cfg, trainer.config_node()), tags)


def hyper_parameters(cfg: Any, node: str) -> dict[str, Any]:
    """Return the settings that tell runs apart: dataset, seed, backbone, optimizer, batch size, and the method's own.

    Args:
        cfg: a configuration.
        node: the key below TRAINER that holds the method's settings; there may be none.
    """
    found = {
        "DATASET.NAME": cfg.DATASET.NAME,
        "DATASET.NUM_SHOTS": cfg.DATASET.NUM_SHOTS,
        "SEED": cfg.SEED,
        "MODEL.BACKBONE.NAME": cfg.MODEL.BACKBONE.NAME,
        "DATALOADER.TRAIN_X.BATCH_SIZE": cfg.DATALOADER.TRAIN_X.BATCH_SIZE,
        "TRAINER.NAME": cfg.TRAINER.NAME,
        **_leaves("OPTIM", cfg.OPTIM),
    }
    own = cfg.TRAINER.get(node)
    if own is not None:
        found.update(_leaves(f"TRAINER.{node}", own))
    return found


def _leaves(prefix: str, node: Any) -> dict[str, Any]:
    """Return all values under a config node by dotted name; what TensorBoard cannot hold becomes text."""
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}.{key}"
        if hasattr(value, "items"):
            leaves.update(_leaves(name, value))
        else:
            leaves[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return leaves
