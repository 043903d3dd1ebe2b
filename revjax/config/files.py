"""Strict YAML: numbers are numbers, a key is written once, nothing is executed, every value knows its line.

Plain scalars follow YAML 1.2 (the core schema), not 1.1: `1e-3` is a float, `no` and `12:30` are strings.
Refused: duplicate keys, anchors and aliases (which allow small files of exponential size), tags, several
documents. A file may build on others:

    base: [decoder.yaml, ../hardware/cpu.yaml]   # relative to this file; later wins, and this file wins over all
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from yaml.composer import Composer, ComposerError
from yaml.emitter import Emitter
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.representer import SafeRepresenter
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner
from yaml.serializer import Serializer

from ..errors import ConfigError, nearest
from .values import Value, merge

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = [  # tag, pattern, possible first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
]


class _Resolver(BaseResolver):
    """Which plain scalars are not strings; both the loader and the dumper go by it."""


for _name, _pattern, _first in _RESOLVERS:
    _Resolver.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    def __init__(self, text: str):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "anchor", None):
            problem = "anchors and aliases are not supported: write the value out, or share it through `base:`"
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(Emitter, Serializer, SafeRepresenter, _Resolver):
    def __init__(self, stream, default_style=None, default_flow_style=False, sort_keys=True, **options):
        serializer = ("encoding", "explicit_start", "explicit_end", "version", "tags")
        Emitter.__init__(self, stream, **{k: v for k, v in options.items() if k not in serializer})
        Serializer.__init__(self, **{k: options.get(k) for k in serializer})
        SafeRepresenter.__init__(self, default_style, default_flow_style, sort_keys)
        _Resolver.__init__(self)

    def ignore_aliases(self, data):
        return True  # what the loader refuses, the dumper does not write


def dump(config: Any) -> str:
    """Returns YAML that `load` reads back to a config equal to `config` (a dataclass instance).

    >>> print(dump(ModelConfig(num_layers=12, learning_rate=1e-3)), end="")
    num_layers: 12
    learning_rate: 0.001
    """
    options = {"default_flow_style": None, "sort_keys": False, "width": 120}
    # Not allow_unicode: PyYAML would then write U+0085, a line break to its reader, as it is.
    return yaml.dump(_to_plain(config), Dumper=_Dumper, allow_unicode=False, **options)


def _to_plain(x: Any) -> Any:
    if dataclasses.is_dataclass(x):
        return {f.name: _to_plain(getattr(x, f.name)) for f in dataclasses.fields(x) if f.init}
    if isinstance(x, Mapping):
        return {k: _to_plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_to_plain(v) for v in x]
    return str(x) if isinstance(x, os.PathLike) else x


def read(path: str | os.PathLike, below: tuple[pathlib.Path, ...] = ()) -> Value:
    """Returns the mapping in the file at `path`, merged over its `base:` files."""
    path = pathlib.Path(path)
    if path.resolve() in [p.resolve() for p in below]:
        chain = " -> ".join(str(p) for p in (*below, path))
        raise ConfigError(f"{below[-1]}: `base:` goes in a circle: {chain}.")
    value = parse(_read_text(path, below), where=str(path))
    if value.data is None:
        value = Value({}, value.where)
    if not isinstance(value.data, dict):
        raise ConfigError(
            f"{value.where}: a config file must be a mapping (`key: value`), but got {value.plain!r:.80}."
        )
    own = {k: v for k, v in value.data.items() if k != "base"}
    merged = Value({}, value.where)
    for base in _bases(value.data.get("base")):
        merged = merge(merged, read(path.parent / base, (*below, path)))
    return merge(merged, Value(own, value.where))


def _bases(value: Value | None) -> list[str]:
    if value is None:
        return []
    names = value.plain if isinstance(value.data, list) else [value.data]
    if not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{value.where}: `base` must be a file name or a list of them, but got {value.plain!r}.")
    return names


def _read_text(path: pathlib.Path, below: tuple[pathlib.Path, ...]) -> str:
    asked = f"{below[-1]}: `base:` asks for it: " if below else ""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{asked}no config file {path}.{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{asked}{path} is not a text file: {e}.") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{asked}cannot read {path}: {getattr(e, 'strerror', None) or e}.") from None


def parse(text: str, *, where: str, shell: bool = False) -> Value:
    """Returns the one YAML document in `text`, which is a file's, or a word from the `shell`.

    `where` names it in errors: with line numbers, unless it comes from the shell, where values keep their text.
    """
    place = lambda mark: where if shell or mark is None else f"{where}:{mark.line + 1}"
    try:
        node = _Loader(text).get_single_node()
        return _to_value(node, place, shell) if node else Value(None, where)
    except yaml.MarkedYAMLError as e:
        problem = ": ".join(filter(None, [e.context, e.problem]))
        quote = " (a value that begins with * or & must be in quotes)" if "alias" in problem else ""
        column = f", column {e.problem_mark.column + 1}" if e.problem_mark else ""
        raise ConfigError(f"{place(e.problem_mark)}: not valid YAML{column}: {problem}{quote}.") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(e).split())}.") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply.") from None


def _to_value(node: yaml.Node, place: Callable, shell: bool) -> Value:
    where, tag = place(node.start_mark), node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and tag in _SCALARS:
        return Value(_scalar(tag, node.value, where), where, node.value if shell else None)
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return Value([_to_value(n, place, shell) for n in node.value], where)
    if isinstance(node, yaml.MappingNode) and tag == "map":
        return Value(_mapping(node, place, shell), where)
    raise ConfigError(f"{where}: the tag {node.tag!r} is not supported: only plain YAML values are.")


_SCALARS = {
    "null": lambda _: None,
    "bool": lambda s: s.lower() == "true",
    "int": lambda s: int(s.replace("_", ""), 16 if s.lower().startswith("0x") else 10),
    "float": lambda s: float(s.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
}


def _scalar(tag: str, text: str, where: str) -> Any:
    try:
        return _SCALARS[tag](text)
    except ValueError as e:  # a tag that lies (`!!int x`), or more digits than Python converts
        raise ConfigError(f"{where}: {text[:40]!r} is not a valid {tag}: {e}.") from None


def _mapping(node: yaml.MappingNode, place: Callable, shell: bool) -> dict[str, Value]:
    mapping = {}
    for key_node, value_node in node.value:
        key, where = _to_value(key_node, place, shell), place(key_node.start_mark)
        if not isinstance(key.data, str):
            raise ConfigError(f"{where}: a key must be a string, but got {key.plain!r}; quote it if it is one.")
        if key.data in mapping:
            raise ConfigError(f"{where}: the key {key.data!r} is written twice, first at {mapping[key.data].where}.")
        mapping[key.data] = dataclasses.replace(_to_value(value_node, place, shell), where=where)
    return mapping
