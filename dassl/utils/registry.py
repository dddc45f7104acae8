"""Tables of classes or functions by name, so that a config can ask for them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

from .errors import UnknownNameError, note_package
from .tools import did_you_mean

T = TypeVar("T")

__all__ = ["Registry"]


class Registry:
    """A named table of objects, keyed by their ``__name__``.

    >>> MODELS = Registry("MODEL")
    >>> @MODELS.register()
    ... class Net: ...
    >>> MODELS.get("Net") is Net
    True

    Raises:
        KeyError: on registering a name twice (unless ``force``), and on asking for an unknown name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._obj_map: dict[str, Any] = {}

    def _add(self, obj: Any, force: bool) -> None:
        name = obj.__name__
        if name in self._obj_map and not force:
            raise KeyError(f'Expected a new name for the registry {self._name} but got "{name}", which is registered')
        self._obj_map[name] = obj
        note_package(obj)

    @overload
    def register(self, obj: None = None, force: bool = False) -> Callable[[T], T]: ...
    @overload
    def register(self, obj: T, force: bool = False) -> T: ...

    def register(self, obj: Any = None, force: bool = False) -> Any:
        """Register ``obj``, or return a decorator when called without one."""
        if obj is not None:
            self._add(obj, force)
            return obj

        def decorate(target: T) -> T:
            self._add(target, force)
            return target

        return decorate

    def get(self, name: str) -> Any:
        """Return the object called ``name``; an unknown name is a KeyError that lists the registered names."""
        if name not in self._obj_map:
            known = self.registered_names()
            raise UnknownNameError(
                f'Expected a name in the registry {self._name} but got "{name}"{did_you_mean(name, known)}. '
                f"Registered: {', '.join(known) or 'nothing'}"
            )
        return self._obj_map[name]

    def registered_names(self) -> list[str]:
        """List all names, in the order of registration."""
        return list(self._obj_map)

    def items(self) -> list[tuple[str, Any]]:
        """List (name, object), in the order of registration."""
        return list(self._obj_map.items())

    def __contains__(self, name: object) -> bool:
        return name in self._obj_map

    def __iter__(self) -> Iterator[str]:
        return iter(self._obj_map)

    def __len__(self) -> int:
        return len(self._obj_map)
