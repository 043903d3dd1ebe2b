"""A tree of values -> nested dataclasses, each value checked against the type of its field."""

import dataclasses
import os
import pathlib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from ..errors import ConfigError, nearest
from .files import parse
from .values import Value

MISSING = dataclasses.MISSING


def build(schema: type, value: Value, path: str = "", default: Any = MISSING) -> Any:
    """Returns `value` as an instance of `schema`, at the dotted `path` of the whole config.

    A dataclass field that `value` leaves out is taken from `default`, an instance of `schema`, where given.
    """
    if dataclasses.is_dataclass(schema):
        return _build_dataclass(schema, value, path, default)
    origin, args = typing.get_origin(schema), typing.get_args(schema)
    if schema is Any:
        return value.plain
    if origin in (Union, types.UnionType):
        return _build_union(schema, args, value, path, default)
    if origin is Literal:
        return _build_literal(schema, args, value, path)
    if origin in (tuple, list):
        return _build_sequence(schema, origin, args, value, path)
    if origin in (dict, Mapping):
        return _build_dict(schema, args, value, path, default)
    return _build_scalar(schema, value, path)


def type_name(schema: Any) -> str:
    """How a type is written in an error message: "int", "float | None", "'a' | 'b'"."""
    origin, args = typing.get_origin(schema), typing.get_args(schema)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in args)
    if origin is Literal:
        return " | ".join(repr(a) for a in args)
    if origin:
        return f"{origin.__name__}[{', '.join('...' if a is ... else type_name(a) for a in args)}]"
    return "None" if schema in (None, type(None)) else getattr(schema, "__name__", str(schema))


def _fields(schema: Any) -> tuple[dataclasses.Field, ...]:
    """Those of a dataclass, or of all dataclasses of a union."""
    if dataclasses.is_dataclass(schema):
        return dataclasses.fields(schema)
    is_union = typing.get_origin(schema) in (Union, types.UnionType)
    return tuple(f for member in typing.get_args(schema) for f in _fields(member)) if is_union else ()


def _build_dataclass(schema, value, path, default):
    if not isinstance(value.data, dict):
        raise _wrong(f"a mapping ({schema.__name__})", value, path)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    hints = typing.get_type_hints(schema)
    section = path or "the config"
    for name, child in value.data.items():
        if name not in fields:
            inside = [f"{f}.{name}" for f in fields if any(name == g.name for g in _fields(hints[f]))]
            hint = f" Did you mean {inside[0]!r}?" if inside else nearest(name, fields)
            raise ConfigError(
                f"{child.where}: unknown field {_join(path, name)!r}.{hint} "
                f"Known fields of {section}: {', '.join(sorted(fields)) or 'none'}."
            )
    given = {}
    for name, field in fields.items():
        at = _join(path, name)
        inherited = _default(field) if not isinstance(default, schema) else getattr(default, name)
        if name in value.data:
            given[name] = build(hints[name], value.data[name], at, inherited)
        elif inherited is not MISSING:
            given[name] = inherited
        elif dataclasses.is_dataclass(hints[name]):  # it may have a default for each of its own fields
            given[name] = build(hints[name], Value({}, value.where), at)
        else:
            raise ConfigError(
                f"{value.where}: {at} is required ({type_name(hints[name])}), but nothing sets it. "
                f"Write it in a config file, or add --{at}=..."
            )
    try:
        return schema(**given)
    except ConfigError:
        raise
    except ValueError as e:
        places = ", ".join(_places(value, str(e))) or value.where
        raise ConfigError(f"{places}: {f'{path}: ' if path else ''}{e}") from e


def _places(section: Value, message: str) -> list[str]:
    """Where the fields that `message` names were set, or all that were, if it names none of these."""
    given = {name: v.where for name, v in section.data.items() if not isinstance(v.data, dict)}
    named = [where for name, where in given.items() if re.search(rf"\b{re.escape(name)}\b", message)]
    return list(dict.fromkeys(named or given.values()))


def _default(field):
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _build_union(schema, args, value, path, default):
    if type(None) in args and (value.data is None or value.text == "None"):
        return None
    members = [a for a in args if a is not type(None)]
    if len(members) == 1:
        try:
            return build(members[0], value, path, default)
        except _WrongType as e:
            if e.path != path:  # about something inside
                raise
            raise _wrong(type_name(schema), value, path) from None
    if isinstance(value.data, dict) and (told_apart := _tag(members)):
        tag, by_tag = told_apart
        if tag in value.data:
            one_of: Any = Literal[*by_tag]
            build(one_of, value.data[tag], _join(path, tag))  # or it is none of them
        usual = next((m for m in members if isinstance(default, m)), members[0])
        member = by_tag[value.data[tag].plain] if tag in value.data else usual
        return build(member, value, path, default if isinstance(default, member) else MISSING)
    for member in members:
        fits = default if isinstance(member, type) and isinstance(default, member) else MISSING
        try:
            return build(member, value, path, fits)
        except ConfigError:
            continue
    raise _wrong(type_name(schema), value, path)


def _tag(members: list) -> tuple[str, dict[str, type]] | None:
    """The field by which dataclasses are told apart, each having one value of its own for it, and these by that value.

    class Cat: kind: Literal["cat"] = "cat"        class Dog: kind: Literal["dog"] = "dog"
    """
    if not all(map(dataclasses.is_dataclass, members)):
        return None
    hints = [typing.get_type_hints(member) for member in members]
    for name in hints[0]:
        values = [typing.get_args(h[name]) for h in hints if typing.get_origin(h.get(name)) is Literal]
        if len(values) == len(members) and all(len(v) == 1 for v in values) and len(set(values)) == len(members):
            return name, {v[0]: member for v, member in zip(values, members, strict=True)}
    return None


def _build_literal(schema, args, value, path):
    for choice in args:
        if (type(choice) is type(value.data) and choice == value.data) or (value.text and choice == value.text):
            return choice
    hint = nearest(value.data, [a for a in args if isinstance(a, str)]) if isinstance(value.data, str) else ""
    raise _wrong(type_name(schema), value, path, hint)


def _build_sequence(schema, origin, args, value, path):
    if value.text is not None and not isinstance(value.data, list):  # --mesh.shape=2,4
        value = parse(f"[{value.text}]", where=value.where, shell=True)
    if not isinstance(value.data, list):
        raise _wrong(type_name(schema), value, path)
    if origin is tuple and args[-1] is not ...:
        if len(args) != len(value.data):
            raise _wrong(f"{type_name(schema)}, {len(args)} values", value, path)
        element_types = args
    else:
        element_types = args[:1] * len(value.data)
    return origin(build(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(zip(element_types, value.data, strict=True)))


def _build_dict(schema, args, value, path, default):
    if not isinstance(value.data, dict):
        raise _wrong(type_name(schema), value, path)
    inherited = default if isinstance(default, Mapping) else {}
    built = {k: build(args[1], v, _join(path, k), inherited.get(k, MISSING)) for k, v in value.data.items()}
    return {**inherited, **built}


def _build_scalar(schema, value, path):
    x = value.data
    if schema is str and value.text is not None:
        return value.text
    if schema is float and type(x) in (int, float):
        try:
            return float(x)
        except OverflowError:
            raise _wrong("float", value, path, " It is too large.") from None
    if schema in (bool, int, str, type(None)) and type(x) is schema:
        return x
    if schema in (pathlib.Path, os.PathLike) and isinstance(x, str):
        return pathlib.Path(value.text or x)
    if schema not in (bool, int, float, str, type(None), pathlib.Path, os.PathLike):
        raise TypeError(f"A config field cannot have the type {schema!r} ({path}).")
    hint = ""
    if schema is int and isinstance(x, float) and x.is_integer():
        hint = f" Write {int(x)}."
    elif schema is str and x is not None and not isinstance(x, dict | list):
        hint = " Put it in quotes."
    raise _wrong(type_name(schema), value, path, hint)


class _WrongType(ConfigError):
    """The value at `path` does not have its field's type (told apart so that a union can name all its members)."""

    def __init__(self, message: str, path: str):
        super().__init__(message)
        self.path = path


def _wrong(expected: str, value: Value, path: str, hint: str = "") -> _WrongType:
    got = repr(value.plain)
    got = got if len(got) <= 80 else f"{got[:77]}..."
    kind = "" if value.data is None else f" ({type(value.data).__name__})"
    is_its_name = value.where.removeprefix("--").replace("-", "_") == path  # --model.num_layers
    subject = value.where if is_its_name else f"{value.where}: {path or 'the config'}"
    message = f"{subject} must be {expected}, but got {got}{kind}.{hint}"
    return _WrongType(message, path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
