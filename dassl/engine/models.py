"""The models that a trainer registers by name, with their optimizers and schedules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from dassl.utils import distributed, tolist_if_not

from .declared import Declared

Names = str | Sequence[str] | None


class RegisteredModels(Declared):
    """Keep models by name, to save, switch between modes, step and schedule them together."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._optims: OrderedDict[str, Any] = OrderedDict()
        self._scheds: OrderedDict[str, Any] = OrderedDict()

    def register_model(self, name: str = "model", model: Any = None, optim: Any = None, sched: Any = None) -> None:
        """Register a model under ``name``, to be saved, switched between modes, stepped and scheduled.

        Raises:
            AttributeError: called before ``super().__init__()``.
            ValueError: the name is taken.
        """
        if self.__dict__.get("_models") is None:
            raise AttributeError("Expected super().__init__() to be called before register_model() but it was not")
        if name in self._models:
            raise ValueError(f'Expected a new model name but got "{name}", which is registered')
        self._models[name] = model
        self._optims[name] = optim
        self._scheds[name] = sched
        if distributed.world_size() > 1 and hasattr(optim, "register_step_pre_hook"):
            # For trainers that step the optimizer themselves. If they also scale gradients, one rank may leave out a
            # step because of an overflow that the others do not have; model_update averages first, and has no such gap.
            optim.register_step_pre_hook(lambda optimizer, *arguments: self._average(optimizer))

    def get_model_names(self, names: Names = None) -> list[str]:
        """Return all registered names, or ``names`` as a list after a check that they are registered."""
        known = list(self._models)
        if names is None:
            return known
        wanted = tolist_if_not(names)
        for name in wanted:
            if name not in known:
                raise KeyError(f'Expected a registered model ({", ".join(known)}) but got "{name}"')
        return wanted

    def set_model_mode(self, mode: str = "train", names: Names = None) -> None:
        """Put registered models into mode "train", or "eval" (also called "test")."""
        if mode not in ("train", "eval", "test"):
            raise KeyError(f'Expected the mode to be "train", "eval" or "test" but got "{mode}"')
        for name in self.get_model_names(names):
            if self._models[name] is not None:
                self._models[name].train(mode == "train")

    def update_lr(self, names: Names = None) -> None:
        """Step the schedulers."""
        for name in self.get_model_names(names):
            if self._scheds[name] is not None:
                self._scheds[name].step()

    def get_current_lr(self, names: Names = None) -> float:
        """Return the learning rate of the first model that has an optimizer; 0 if none has.

        Of several parameter groups, the first counts.
        """
        for name in self.get_model_names(names):
            if self._optims[name] is not None:
                return self._optims[name].param_groups[0]["lr"]
        return 0.0

    def _optimizers(self, names: Names) -> list[Any]:
        return [self._optims[name] for name in self.get_model_names(names) if self._optims[name] is not None]

    def _average(self, optimizer: Any) -> None:
        """Average the gradients of an optimizer over the processes (see Steps)."""
        raise NotImplementedError
