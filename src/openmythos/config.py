"""Strict configs: conversion of frozen dataclasses to and from dicts; "a.b=c" overrides.

Values are checked against the annotations. A swappable part is a union of dataclasses, each with a
tag such as ``kind: Literal["lti"] = "lti"``. For a table with a ``kind``, missing keys are the
defaults of that kind; without one, they come from the default of the field.
"""

import contextlib
import dataclasses
import difflib
import functools
import operator
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

T = TypeVar("T")

_MISSING = dataclasses.MISSING
_REGISTERED: dict[Any, list[type]] = {}  # union: members added by `register`
_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_INT64 = 2**63
# Largest layer width and largest count, such as of heads; so that products do not overflow.
MAX_WIDTH, MAX_PARTS = 2**20, 2**16
_SHOWN = 200  # longest value in an error message, in characters
_OPS = {"above": operator.gt, "at least": operator.ge, "below": operator.lt, "at most": operator.le}


class ConfigError(ValueError):
    """Wrong user input; the message is one line that says what is allowed."""


def needs(extra: str) -> str:
    """Error text for packages that are only installed with an extra."""
    return f"needs: pip install 'openmythos[{extra}]'"


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise a ConfigError naming field, value and what is allowed, unless the condition holds."""
    if not condition:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise ConfigError(f"{field} = {shown}: {allowed}")


def require_int(
    field: str, value: object, minimum: int | None = None, maximum: int | None = None
) -> None:
    """Accept an int (not a bool) within the inclusive bounds."""
    _require_within(field, value, int, {"at least": minimum, "at most": maximum})


def require_number(
    field: str,
    value: object,
    *,
    above: int | float | None = None,
    at_least: int | float | None = None,
    below: int | float | None = None,
    at_most: int | float | None = None,
) -> None:
    """Accept an int or float (not a bool, not nan) within the bounds."""
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    _require_within(field, value, float, bounds)


def _require_within(field: str, value: Any, wanted: type, bounds: Mapping[str, Any]) -> None:
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    typed = isinstance(value, int | wanted) and not isinstance(value, bool)
    # nan is not equal to itself.
    if typed and value == value and all(_OPS[word](value, given[word]) for word in given):
        return
    limits = " and ".join(f"{word} {bound}" for word, bound in given.items())
    require(False, field, value, f"must be {_TYPES[wanted]}" + (f", {limits}" if limits else ""))


def unknown_name(noun: str, given: object, known: Iterable[str], *, as_listed: bool = False) -> str:
    """Error text for an unknown name: the most similar known name, then all known names.

    All names are sorted unless `as_listed`.
    """
    names = list(known) if as_listed else sorted(known)
    near = difflib.get_close_matches(str(given).lower(), names, n=1, cutoff=0.4)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return f"unknown {noun}{hint} known: {', '.join(names)}"


def register(union: Any, member: type[T]) -> type[T]:
    """Add a class to a tagged union, so that files and the command line can name its kind."""
    _REGISTERED.setdefault(union, []).append(member)
    return member


def kinds(union: Any) -> dict[str, type]:
    """The classes of a tagged union (or of one tagged class) by their ``kind``."""
    found: dict[str, type] = {}
    members = get_args(union) or (union,)
    # A class registered for a union is also a member of larger unions that contain it.
    new = [n for u, added in _REGISTERED.items() if {*get_args(u)} <= {*members} for n in added]
    for member in (*members, *new):
        tag = get_args(_hints(member).get("kind"))
        if len(tag) != 1 or tag[0] in found:
            raise TypeError(f"{union}: {member} needs a kind of its own, a one-value Literal")
        found[tag[0]] = member
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A plain nested dict; tuples become lists, members of a union carry their ``kind``."""
    return {name: _plain(getattr(config, name)) for name in _fields(type(config))}


@overload
def from_dict(cls: type[T], data: Any, path: str = "") -> T: ...
@overload
def from_dict(cls: object, data: Any, path: str = "") -> Any: ...
def from_dict(cls: Any, data: Any, path: str = "") -> Any:
    """Build a dataclass or a member of a tagged union; nothing in ``data`` is ignored."""
    config = _build(cls, data, path)
    if _build(type(config), to_dict(config), path) != config:
        raise TypeError(f"{path or type(config).__name__}: does not survive to_dict and from_dict")
    return config


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A new config with all "a.b=value" applied in order; only the final config must be valid.

    Setting another kind ("x.kind=add" or "x=add") replaces that part by the new kind's defaults.
    """
    data = to_dict(config)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}: must be written path.to.field=value")
        _assign(data, [key.strip() for key in dotted.split(".")], text.strip())
        # Fill in the defaults of a new kind. A later override may still make the config valid.
        with contextlib.suppress(ConfigError):
            data = to_dict(from_dict(type(config), data))
    return from_dict(type(config), data)


def _assign(table: dict[str, Any], keys: Sequence[str], text: str) -> None:
    """Set the value at the path `keys` in the nested dict of a config."""
    for depth, key in enumerate(keys[:-1], 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{'.'.join(keys)}: {'.'.join(keys[:depth])} has no keys of its own")
    key, value = keys[-1], _parse(text)
    current = table.get(key)
    if isinstance(value, str) and isinstance(current, dict) and "kind" in current:
        table, key, current = current, "kind", current["kind"]
    if isinstance(current, str) and key == "kind":
        if value != current:
            table.clear()
    elif isinstance(current, str) and not isinstance(value, str):
        value = text
    table[key] = value


def _parse(text: str) -> Any:
    """Parse the text as a TOML value; if it is not TOML, return it unchanged."""
    try:
        table = tomllib.loads(f"v = {text}")
    except ValueError:  # not TOML, or more digits than Python reads
        return text
    except RecursionError:
        raise ConfigError(f"override ...={text[:20]}...: is nested too deeply") from None
    # A line break in the text can end the value and start another key.
    return table["v"] if len(table) == 1 else text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _fields(cls: Any) -> dict[str, Any]:
    """The default of each field of ``__init__``, or _MISSING."""
    return {
        field.name: field.default if field.default_factory is _MISSING else field.default_factory()
        for field in dataclasses.fields(cls)
        if field.init
    }


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The annotations of a class, evaluated once: configs are built thousands of times."""
    return get_type_hints(cls)


def _is_tagged(wanted: Any) -> bool:
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
        return len(get_args(_hints(wanted).get("kind"))) == 1
    # `int | None` is not supported in configs: TOML cannot express None.
    is_union = get_origin(wanted) in (Union, UnionType)
    return is_union and all(dataclasses.is_dataclass(member) for member in get_args(wanted))


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _build(wanted: Any, data: Any, path: str, default: object = _MISSING) -> Any:
    """Convert ``data`` to the annotation ``wanted``; error messages start with ``path``."""
    if dataclasses.is_dataclass(wanted) or _is_tagged(wanted):
        return _build_config(wanted, data, path, default)
    if get_origin(wanted) is dict and get_args(wanted)[0] is str:
        require(isinstance(data, Mapping), path, data, "must be a table")
        for key in data:
            require(isinstance(key, str), f"a key of {path}", key, "must be a string")
        return {key: _build(get_args(wanted)[1], data[key], _join(path, key)) for key in data}
    if get_origin(wanted) is tuple and get_args(wanted)[1:] == (...,):
        require(isinstance(data, list | tuple), path, data, "must be a list")
        item = get_args(wanted)[0]
        return tuple(_build(item, value, f"{path}[{i}]") for i, value in enumerate(data))
    return _build_scalar(wanted, data, path)


def _build_scalar(wanted: Any, value: Any, path: str) -> Any:
    if wanted is Any:
        return value
    if get_origin(wanted) is Literal:
        choices = get_args(wanted)
        # Compare types too: 1 == 1.0 == True.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            allowed = unknown_name("choice", value, map(str, choices), as_listed=True)
            require(False, path, value, allowed)
    elif wanted is int:
        require_int(path, value)
        require(-_INT64 <= value < _INT64, path, value, "must be within -2**63 and 2**63 - 1")
    elif wanted is float:
        require_number(path, value)
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path}: must be smaller, a float cannot hold it") from None
    elif wanted in (bool, str):
        require(isinstance(value, wanted), path, value, f"must be {_TYPES[wanted]}")
    else:
        raise TypeError(f"{path}: a config cannot hold {wanted}")
    return value


def _build_config(wanted: Any, data: Any, path: str, default: object) -> Any:
    members = kinds(wanted) if _is_tagged(wanted) else {}
    if isinstance(data, str) and members:
        data = {"kind": data}
    allowed = f"must be a table or one of {', '.join(sorted(members))}"
    allowed = allowed if members else "must be a table"
    require(isinstance(data, Mapping), path or "config", data, allowed)
    cls = _member(members, data, path, type(default)) if members else wanted
    own = _fields(cls)
    for key in data:
        if key not in own:
            raise ConfigError(f"{_join(path, key)}: {unknown_name('key', key, own)}")
    if type(default) is cls and not (members and "kind" in data):
        own = {name: getattr(default, name) for name in own}
    hints = _hints(cls)
    values = {
        name: _build(hints[name], data[name], _join(path, name), own[name])
        if name in data
        else own[name]
        for name in own
    }
    missing = [_join(path, name) for name, value in values.items() if value is _MISSING]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing, must be given")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_join(path, error)) from error


def _member(
    members: Mapping[str, type], table: Mapping[str, Any], path: str, default: type
) -> type:
    """The class of a table: of its ``kind`` if it has one, else that of the field's default."""
    if "kind" in table:
        kind = table["kind"]
        if not isinstance(kind, str) or kind not in members:
            require(False, _join(path, "kind"), kind, unknown_name("kind", kind, members))
        return members[kind]
    if default in members.values():
        return default
    if len(members) > 1:
        raise ConfigError(f"{_join(path, 'kind')}: missing; known: {', '.join(sorted(members))}")
    return next(iter(members.values()))
