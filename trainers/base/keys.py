"""Declare a method's settings once: keys of the configuration, checks, constructors and the tables of docs follow.

    @dataclass(frozen=True)
    class MyConfig(FrozenConfig):
        width: int = key(64, "width of the bottleneck", low=1, source="64")

gives the key WIDTH in the method's node, refuses 0, and says so in docs/METHODS.md. The network takes a MyConfig, so
each default is written in one place only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("fp32", "fp16", "amp", "bf16")


@dataclass(frozen=True)
class Key:
    """Describe one key of a configuration.

    Attributes:
        about: what the key means, with its unit.
        low, high: ends of its range, which belong to the range; above, below: ends that do not.
        choices: the values that it may have; empty: anything of its type.
        words: whether it is text before a class name, without a placeholder.
        source: the value that the method's authors use; "": they have no such key, or use the default.
    """

    about: str
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    choices: tuple[str, ...] = ()
    words: bool = False
    source: str = ""

    def bounds(self) -> str:
        """Return the range in words; "" where there is none."""
        parts = [
            f"{name} {value:g}"
            for name, value in (
                ("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below),
            )
            if math.isfinite(value)
        ]  # fmt: skip
        return " and ".join(parts)

    def admits(self, value: float) -> bool:
        """Return whether a number is in the range."""
        return math.isfinite(value) and self.low <= value <= self.high and self.above < value < self.below


def key(default: Any, about: str, **limits: Any) -> Any:
    """Return a dataclass field that is a key of the configuration; for `limits` see Key."""
    return field(default=default, metadata={"key": Key(about, **limits)})


def precision(default: str, rest: str = "what is learnt is kept in fp32") -> Any:
    """Return the field for the precision of the frozen CLIP."""
    about = f"precision of the frozen CLIP: fp32, fp16, amp (fp32 weights, autocast) or bf16; {rest}"
    return key(default, about, choices=PRECISIONS)


def kept_views(default: int, **limits: Any) -> Any:
    """Return the field for the number of augmentations whose features are kept."""
    about = (
        "seeded augmentations of each training image, encoded once; epoch e uses view e mod VIEWS; "
        "0: the images as they are at test time"
    )
    return key(default, about, low=0, **limits)


@dataclass(frozen=True)
class MethodConfig:
    """Hold the settings that every method has. They are checked when a configuration is read, not here."""

    prec: str = precision("fp32")

    def check(self, path: str) -> None:
        """Check conditions that involve more than one key.

        Args:
            path: the path of the method's node, for messages, such as "TRAINER.COOP".

        Raises:
            ValueError: the settings do not go together.
        """


def key_name(name: str) -> str:
    """Return the key of a field: lambda_ -> LAMBDA."""
    return name.rstrip("_").upper()


@functools.cache
def keys_of(config: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """Return the fields of a config class with their types, in order."""
    types = typing.get_type_hints(config)
    return [(one, types[one.name]) for one in dataclasses.fields(config)]


def _default(one: dataclasses.Field[Any]) -> Any:
    if one.default is not dataclasses.MISSING:
        return one.default
    assert one.default_factory is not dataclasses.MISSING
    return one.default_factory()


def add_keys(cfg: Any, node: Any, config: type) -> None:
    """Add the keys of a config class to a node of a configuration, in place; keys that exist are left alone.

    Args:
        cfg: any node, whose class new nodes get.
        node: where the keys go.
        config: the dataclass.
    """
    for one, kind in keys_of(config):
        name = key_name(one.name)
        if name in node:
            continue
        if dataclasses.is_dataclass(kind):
            node[name] = type(cfg)()
            add_keys(cfg, node[name], typing.cast(type, kind))
        else:
            node[name] = _default(one)


def has_keys(node: Any, config: type) -> bool:
    """Return whether a node has the keys of a config class; a configuration made by hand may lack them."""
    return all(key_name(one.name) in node for one, _ in keys_of(config))


def read_keys(node: Any, path: str, config: type) -> Any:
    """Check a node of a configuration and return its values.

    Args:
        node: the node.
        path: its name, for messages.
        config: the dataclass whose instance is wanted.

    Raises:
        ValueError: a value does not suit its key; the message names the key, what was expected and what came.
    """
    values = {}
    for one, kind in keys_of(config):
        name = key_name(one.name)
        value = node[name]
        if dataclasses.is_dataclass(kind):
            values[one.name] = read_keys(value, f"{path}.{name}", typing.cast(type, kind))
        else:
            check_value(value, f"{path}.{name}", one.metadata["key"], kind)
            values[one.name] = float(value) if kind is float else value
    found = config(**values)
    if isinstance(found, MethodConfig):
        found.check(path)
    return found


def check_value(value: Any, path: str, about: Key, kind: Any) -> None:
    """Check one value against the limits and the type of its key.

    Args:
        value: the value.
        path: the key, for the message.
        about: the limits of the key.
        kind: the type of the key, perhaps `| None`.

    Raises:
        ValueError: the value does not suit.
    """
    options = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    if value is None and type(None) in options:
        return
    kind = next(option for option in options if option is not type(None))
    for known, (suits, wanted) in _KINDS.items():
        if kind is known and not suits(value, about):
            expected = wanted(about)
            comma = "," if about.bounds() and kind in (int, float) else ""
            raise ValueError(f"Expected {path} to be {expected}{comma} but got {value!r}")


def check_number(value: Any, path: str, **limits: Any) -> None:
    """Check a number that is no key of a method; for `limits` see Key."""
    check_value(value, path, Key("", **limits), float)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text_suits(value: Any, about: Key) -> bool:
    if about.choices:
        return value in about.choices
    return isinstance(value, str) and not (about.words and "{" in value)


def _text_wanted(about: Key) -> str:
    if about.choices:
        return f"one of {', '.join(about.choices)}"
    return "words such as 'a photo of a', or ''," if about.words else "text"


_KINDS: dict[type, tuple[Callable[[Any, Key], bool], Callable[[Key], str]]] = {
    bool: (lambda value, about: isinstance(value, bool), lambda about: "True or False"),
    int: (
        lambda value, about: isinstance(value, int) and not isinstance(value, bool) and about.admits(value),
        lambda about: f"a whole number, {about.bounds()}" if about.bounds() else "a whole number",
    ),
    float: (
        lambda value, about: _is_number(value) and about.admits(value),
        lambda about: f"a number, {about.bounds()}" if about.bounds() else "a number, finite,",
    ),
    str: (_text_suits, _text_wanted),
}


def describe_keys(config: type, prefix: str = "") -> list[tuple[str, str, str, str, str]]:
    """Return a table row for each key: name, default, range or choices, meaning, and the source's value."""
    rows = []
    for one, kind in keys_of(config):
        name = prefix + key_name(one.name)
        if dataclasses.is_dataclass(kind):
            rows += describe_keys(typing.cast(type, kind), f"{name}.")
            continue
        about: Key = one.metadata["key"]
        allowed = ", ".join(about.choices) or about.bounds()
        rows.append((name, repr(_default(one)), allowed, about.about, about.source))
    return rows
