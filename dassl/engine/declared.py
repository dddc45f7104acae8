"""The contract of a method: all that engine, hooks, scripts and predict.py ask of a trainer, with types and defaults.

A method overrides what it needs. Nothing outside this list is asked for, so a name that is misspelt is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dassl.utils import distributed


class Declared:
    """Declare what a trainer says of itself.

    What can be known without data is asked of the class:

    Attributes:
        recipe: number of the method's recipe, raised when the same settings give other numbers than before. A run
            of another recipe is neither resumed nor counted as a run of this one.
        paper: who has published the method, and when; for tables.
        learns: what is trained or fitted; for tables.
        node_name: the key below TRAINER that holds the method's settings; "": the class's name in upper case.
        main_head: the head that counts as the method's accuracy; "": the first.
        reference_head: the head that pictures show as "before"; "": none.
        of_each_class: what each class trained on has of its own ("weights", say), so that no other class can be
            classified; "": nothing. Where the answer depends on settings, ``each_class_has`` gives it.
        needs_training_images: whether the trainer cannot be built, to predict, without its training images.
        loss_terms: names in what forward_backward returns that are losses although they do not contain "loss".
        fitted_parameters: how many numbers are fitted without gradients; they count as trained parameters.
        selected: what was chosen, and on which data: ``{"beta": {"value": 0.4, "on": "val", "n": 40}}``.
        cfg, dm, device: configuration, data manager and device, once the trainer is built.
    """

    recipe: int = 1
    paper: str = ""
    learns: str = ""
    node_name: str = ""
    main_head: str = ""
    reference_head: str = ""
    of_each_class: str = ""
    needs_training_images: bool = False
    loss_terms: tuple[str, ...] = ()
    fitted_parameters: int = 0

    selected: dict[str, dict[str, Any]]
    cfg: Any = None
    dm: Any = None
    device: torch.device = torch.device("cpu")
    evaluator: Any = None

    # ---- asked of the class

    @classmethod
    def config_node(cls) -> str:
        """Return the key below TRAINER that holds the method's settings."""
        return cls.node_name or cls.__name__.upper()

    @classmethod
    def add_config(cls, cfg: Any) -> None:
        """Add the method's keys to a configuration, in place, unless they are there."""

    @classmethod
    def check_settings(cls, cfg: Any) -> None:
        """Check all that can be checked before data and model are loaded.

        Raises:
            ValueError: a setting does not suit the method.
        """

    @classmethod
    def trains(cls, cfg: Any) -> bool:
        """Return whether the method learns or fits anything; if not, shots and seed do not matter."""
        return True

    @classmethod
    def each_class_has(cls, cfg: Any) -> str:
        """Return what each class trained on has of its own; see ``of_each_class``."""
        return cls.of_each_class

    @classmethod
    def memory_advice(cls, cfg: Any) -> Sequence[str]:
        """Return settings (KEY VALUE) that make a run need less memory than ``cfg`` does."""
        return ()

    # ---- asked of the trainer

    @property
    def writes_files(self) -> bool:
        """Say whether this process writes the files of the run: of several, rank 0 alone does."""
        return distributed.is_main()

    def model_inference(self, input: Any) -> Any:
        """Return logits [B, C] of the main head, or a dict of them by head, for a test input."""
        raise NotImplementedError

    def model_heads(self, input: Any) -> Any:
        """Return logits [B, C] by head for a test input; by default those of ``model_inference``."""
        return self.model_inference(input)

    def model_report(self, input: Any) -> dict[str, Any]:
        """Return the heads of a test input, with what figures show beside them.

        Returns:
            "heads": as ``model_heads`` gives them; and perhaps "values" (name -> [B] or [B, 1]) and "features"
            (branch -> [B, E]); see dassl/evaluation/predictions.py.
        """
        return {"heads": self.model_heads(input)}

    def bind_classes(self, classnames: Sequence[str], class_indices: Sequence[int] | None = None) -> bool:
        """Set the class list that logits are for, where the method can.

        Args:
            classnames: the classes.
            class_indices: which of the classes trained on these are; None: take them as new classes.

        Returns:
            Whether the classes are a part of those trained on, so that logits are computed over all classes trained on
            and cut to these columns.
        """
        return False

    def run_notes(self) -> dict[str, Any]:
        """Return further entries of metrics.json."""
        return {}

    def run_tables(self) -> dict[str, Sequence[Sequence[Any]]]:
        """Return CSV files to write at the end of a run: name -> rows, the head first."""
        return {}

    def run_state(self) -> dict[str, Any]:
        """Return plain values that the method keeps from step to step outside of registered models."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Put ``run_state`` back, in a resumed run."""

    def after_update(self) -> None:
        """Move what follows the model from step to step: a running mean, a center, a teacher.

        ``model_update`` calls it after the optimizers have stepped. It is never called for a step that is left out, so
        that numbers that are NaN or infinite cannot get into what is moved here.
        """
