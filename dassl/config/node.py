"""yacs' CfgNode with file inheritance, hints for misspelt keys, and integers accepted where a float is expected."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as YacsNode

from dassl.utils.errors import InputError, UnknownNameError
from dassl.utils.tools import did_you_mean

BASE_KEY = "_BASE_"
MAX_VALUES = 10_000  # in a file, aliased values counted at each use; the defaults have some 300
_SEQUENCES = (list, tuple)
_NULLABLE: set[str] = set()  # names, with dots, of settings whose default is None: None stays allowed
_LAST_DUMP: dict[str, str] = {}  # repr of the last tree that was dumped -> YAML
_TEXT_OR_LIST: set[str] = set()  # names, with dots, of settings that are a text or a list of texts


class CfgNode(YacsNode):
    """A tree of settings that reads YAML files with `_BASE_`.

    An unknown key, or a value of another type than the default's, raises an InputError that says so.
    """

    follows_base = True

    def merge_from_file(self, cfg_filename: str | os.PathLike[str]) -> dict[str, Any]:
        """Merge a YAML file, after the file that its ``_BASE_:`` names (relative to it).

        Returns:
            The values that the file sets or inherits, by key (with dots).

        Raises:
            InputError: as ``read_yaml``, or a value of another type than the default's.
            UnknownNameError: a key that is not there.
        """
        found: dict[str, Any] = {}
        for path, values in _read_chain(Path(cfg_filename).expanduser()):
            found.update(_flat(values, ""))
            try:
                _merge(self, values, ())
            except UnknownNameError as error:
                raise UnknownNameError(f'In "{path}": {error}') from error
            except InputError as error:
                raise InputError(f'In "{path}": {error}') from error
        return found

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge another tree of settings into this one."""
        _merge(self, cfg_other, ())

    def dump(self, **kwargs: Any) -> str:
        """Return the tree as YAML; the text of the last tree is kept, as every checkpoint of a run has the same."""
        if kwargs:
            other: str = super().dump(**kwargs)
            return other
        content = repr(self)  # tells all values and their types apart, in a hundredth of YAML's time
        text = _LAST_DUMP.get(content)
        if text is None:
            text = super().dump()
            _LAST_DUMP.clear()
            _LAST_DUMP[content] = text
        return text

    @staticmethod
    def declare_text_or_list(name: str) -> None:
        """Let the setting ``name`` (with dots) be a text or a list of texts, whichever its default is."""
        _TEXT_OR_LIST.add(name)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge ``[key, value, key, value, ...]``, keys with dots: ``["OPTIM.LR", "1e-3"]``."""
        if len(cfg_list) % 2:
            raise InputError(
                f"Expected overrides as pairs KEY VALUE but got an odd number of words: {' '.join(map(str, cfg_list))}"
            )
        for name, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            nested: Any = value
            for part in reversed(str(name).split(".")):
                nested = {part: nested}
            _merge(self, nested, ())


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the keys and values of a YAML file, without running anything in it.

    Raises:
        InputError: unreadable, not YAML, no keys and values, a key twice in one section, or values without end
            (aliases that multiply).
    """
    return _read_yaml(Path(path), needed_by=None)


def _read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, its own keys) for ``path`` and for the files it inherits from, the outermost base first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        resolved = path.resolve()
        if resolved in seen:
            loop = " -> ".join(str(p) for p in [*seen[seen.index(resolved) :], resolved])
            raise InputError(f"Expected {BASE_KEY} to lead to a file without one but got a cycle: {loop}")
        seen.append(resolved)
        values = _read_yaml(path, needed_by=chain[-1][0] if chain else None)
        base = values.pop(BASE_KEY, None)
        chain.append((path, values))
        if base is None:
            return chain[::-1]
        if not isinstance(base, str) or not base:
            raise InputError(f'Expected {BASE_KEY} in "{path}" to be a file name but got {base!r}')
        path = path.parent / Path(base).expanduser()  # an absolute base replaces the parent


def _read_yaml(path: Path, needed_by: Path | None) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        where = f' ({BASE_KEY} of "{needed_by}")' if needed_by else ""
        raise InputError(f'Expected a readable config file at "{path}"{where} but got: {error}') from error
    try:
        values = yaml.load(text, Loader=_OnceLoader)  # a safe loader: it makes plain values only
    except _KeyTwiceError as error:
        raise InputError(f'Expected "{path}" to name each key of a section once but {error}') from error
    except RecursionError as error:
        raise InputError(f'Expected "{path}" to be YAML but got brackets nested too deep') from error
    except (yaml.YAMLError, ValueError) as error:  # a date without such a day is a ValueError
        reason = " ".join(str(error).split())  # PyYAML spreads its message over lines
        raise InputError(f'Expected "{path}" to be YAML but got: {reason}') from error
    if values is None:  # an empty file, or only comments
        return {}
    if not isinstance(values, dict):
        raise InputError(f'Expected "{path}" to hold keys and values but got a {type(values).__name__}')
    _check_size(values, path)
    return values


class _KeyTwiceError(Exception):
    """A key stands twice in one section; PyYAML would let the second replace the first, with all that is in it."""


class _OnceLoader(yaml.SafeLoader):
    """The safe loader, which also refuses keys that stand twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise _KeyTwiceError(f"{key.value} stands in line {lines[key.value]} and again in line {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _check_size(values: Any, path: Path) -> None:
    # A few nested aliases can stand for more values than there are atoms; an aliased value can contain itself.
    count, waiting = 0, [values]
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MAX_VALUES:
            raise InputError(f'Expected "{path}" to have at most {MAX_VALUES} values but got more (endless aliases?)')
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (*_SEQUENCES, set)):
            waiting.extend(value)


def _merge(into: YacsNode, values: Mapping[str, Any], parents: tuple[str, ...]) -> None:
    """Merge nested ``values`` into the tree, checking each key and the type of each value."""
    if into.is_frozen():
        raise AttributeError("Expected a config that may be changed but got a frozen one")
    for raw_key, raw_value in values.items():
        key = str(raw_key)
        path = (*parents, key)
        name = ".".join(path)
        is_section = isinstance(raw_value, Mapping)
        value = raw_value if is_section else YacsNode._decode_cfg_value(copy.deepcopy(raw_value))
        if key not in into:
            if into.is_new_allowed():
                if is_section:
                    into[key] = CfgNode(new_allowed=True)
                    _merge(into[key], value, path)
                else:
                    into[key] = value
                continue
            hint = did_you_mean(key, list(into))
            section = ".".join(parents) or "the config"
            raise UnknownNameError(f'Expected a key of {section} but got the unknown key "{name}"{hint}')
        old = into[key]
        if isinstance(old, YacsNode):
            if value is None:  # a section whose lines are all commented out
                continue
            if not is_section:
                raise InputError(f"Expected {name} to be a section with keys of its own but got {value!r}")
            _merge(old, value, path)
        else:
            a_list = name in _TEXT_OR_LIST and isinstance(value, _SEQUENCES)
            may_be_text = isinstance(old, str) or name in _TEXT_OR_LIST
            kept = value is None or isinstance(value, str) or a_list
            if may_be_text and isinstance(raw_value, str) and not kept:
                value = raw_value  # a text setting whose text happens to read as a number or a list
            into[key] = _coerce(value, old, name)


def _coerce(value: Any, old: Any, name: str) -> Any:
    """Return ``value`` in the type of the default ``old``.

    An int becomes a float, and list and tuple interchange; any other mismatch is an InputError.
    """
    if old is None:
        _NULLABLE.add(name)
        return value
    if type(value) is type(old) or (value is None and name in _NULLABLE):
        return value
    if value is None:
        raise InputError(
            f"Expected {name} to have a value of type {type(old).__name__} (like its default {old!r}) but got none "
            "(null, None or nothing after the colon): leave the key out to take the default"
        )
    if name in _TEXT_OR_LIST and isinstance(value, (str, *_SEQUENCES)):
        return value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    for wanted, given in (_SEQUENCES, _SEQUENCES[::-1]):
        if isinstance(old, wanted) and isinstance(value, given):
            return wanted(value)
    raise InputError(
        f"Expected {name} to be of type {type(old).__name__} (like its default {old!r}) "
        f"but got {value!r} of type {type(value).__name__}"
    )
