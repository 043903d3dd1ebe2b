"""Puts files, environment and command line on top of one another, and builds the schema from the result."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from ..errors import ConfigError
from .files import dump, parse, read
from .schema import build
from .values import Value, merge

T = TypeVar("T")
ENV_PREFIX = "REVJAX__"


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[T]):
    """A config, and where each of its values was set."""

    config: T
    provenance: dict[str, str]  # "model.num_layers" -> "configs/a.yaml:3", "--model.num_layers", "default"

    def describe(self) -> str:
        """The config as YAML, which `load` reads back, with where each value was set as a comment beside it."""
        lines = [*_lines(self.config, self.provenance)]
        width = min(max(len(text) for text, _ in lines), 60)
        return "\n".join(f"{text:<{width}}  # {where}" if where else text for text, where in lines) + "\n"


def _lines(config: Any, provenance: Mapping[str, str], path: str = "", indent: str = ""):
    for f in dataclasses.fields(config):
        at, value = f"{path}.{f.name}" if path else f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield f"{indent}{f.name}:", None
            yield from _lines(value, provenance, at, indent + "  ")
        else:
            text = " ".join(dump({f.name: value}).split())
            yield indent + (text[1:-1] if text[0] == "{" else text), provenance.get(at, "default")


def load(
    schema: type[T],
    paths: str | os.PathLike | Sequence[str | os.PathLike] = (),
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> T:
    """Returns an instance of the dataclass `schema`, set by files, environment and command line.

    Args:
      schema: a dataclass whose fields are bool, int, float, str, Path, Literal, unions with None, tuples,
        lists, dicts from str, and dataclasses of these. `__post_init__` may refuse values by a `ValueError`.
      paths: YAML files; later ones win.
      overrides: command-line words: `--model.num_layers=48`, or `--model.num_layers` followed by `48`.
      environ: the environment, of which names that start with REVJAX__ are read.

    Raises `ConfigError` for anything that is wrong with a file, a variable or an argument.

    >>> load(RunConfig, "configs/small.yaml", ["--model.num_layers=48"])
    """
    return load_with_provenance(schema, paths, overrides, environ).config


def load_with_provenance(
    schema: type[T],
    paths: str | os.PathLike | Sequence[str | os.PathLike] = (),
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Loaded[T]:
    """Like `load`, but also returns where every value was set, by dotted name."""
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    tree = Value({}, ", ".join(str(p) for p in paths) or "command line")
    for layer in (*map(read, paths), *_from_environment(environ), *_from_command_line(overrides)):
        tree = dataclasses.replace(merge(tree, layer), where=tree.where)
    config = build(schema, tree)
    return Loaded(config, dict(_provenance(config, tree)))


def _from_environment(environ: Mapping[str, str]):
    for name in sorted(n for n in environ if n.startswith(ENV_PREFIX)):
        yield _nested(name.removeprefix(ENV_PREFIX).lower().split("__"), environ[name], where=name)


def _from_command_line(words: Sequence[str]):
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"Unexpected argument {word!r}: overrides are written --section.field=value.")
        name, equals, text = word.partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{name} needs a value: write {name}=VALUE (for a switch, {name}=true).")
            text = words.pop(0)
        yield _nested(name[2:].replace("-", "_").split("."), text, where=name)


def _nested(keys: list[str], text: str, *, where: str) -> Value:
    if not all(keys):
        raise ConfigError(f"{where} is not the name of a field: write --section.field=value.")
    try:
        value = Value(parse(text, where=where, shell=True).data, where, text)
    except ConfigError:  # not YAML, so it can only be meant as a string
        value = Value(text, where, text)
    for key in reversed(keys):
        value = Value({key: value}, where)
    return value


def _provenance(config: Any, value: Value | None, path: str = ""):
    if dataclasses.is_dataclass(config):
        children = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    elif isinstance(config, Mapping) and config:
        children = config
    else:
        yield path, value.where if value else "default"
        return
    given = value.data if value and isinstance(value.data, dict) else {}
    for name, child in children.items():
        yield from _provenance(child, given.get(name), f"{path}.{name}" if path else name)
