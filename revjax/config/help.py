"""The text of `--help`, from the types, comments and defaults of a dataclass."""

import contextlib
import dataclasses
import io
import shutil
import textwrap
import types
import typing
from typing import Any

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from .files import dump

_SECTIONS = """\
Each field can be set by --section.field=VALUE, in a YAML file, or by the environment variable \
REVJAX__SECTION__FIELD=VALUE. The command line wins over the environment, which wins over files. Values are written \
as in YAML: null, true, 1e-3, [1, 2]."""
_MARK = "(what stands before it is ours)"
_FLAT = "Options are written --name=VALUE, and values as in YAML: null, true, 1e-3, [1, 2]."


def help_text(schema: type, *, prog: str, description: str, default: Any = None) -> str:
    """Returns what `prog --help` prints: each field of `schema` with its type, comment and default.

    `description` begins with the usage line. `default` is an instance of `schema` that has the defaults; where a field
    may be one of several dataclasses, it also says which.
    """
    usage, *paragraphs = description.strip().split("\n\n")
    has_sections = any(map(dataclasses.is_dataclass, typing.get_type_hints(schema).values()))
    paragraphs.append(_SECTIONS if has_sections else _FLAT)
    width = min(shutil.get_terminal_size().columns, 120)
    intro = "\n\n".join(textwrap.fill(text, width) for text in [f"usage: {usage}", *paragraphs])
    registry, out = ConstructorRegistry(), io.StringIO()
    registry.primitive_rule(_written_as_yaml)
    with registry, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(
            schema,
            default=default if default is not None else tyro.MISSING_NONPROP,
            args=["--help"],
            prog=prog,
            description=_MARK,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),  # of a union, the default
        )
    _, _, options = out.getvalue().partition(_MARK)
    return intro + options


def _written_as_yaml(info):
    """tyro would show None, True and several words: show values as `load` reads them."""
    if typing.get_origin(info.type) is None and info.type not in (bool, int, float, str):
        return None  # a section
    if typing.get_args(info.type) and all(map(dataclasses.is_dataclass, typing.get_args(info.type))):
        return None  # one of several
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_metavar(info.type),
        instance_from_str=lambda words: yaml.safe_load(words[0]),
        is_instance=lambda x: True,
        str_from_instance=lambda x: [_as_yaml(x)],
    )


def _as_yaml(x) -> str:
    return x if isinstance(x, str) and x else dump(x).removesuffix("...\n").strip()


def _metavar(schema) -> str:
    origin, args = typing.get_origin(schema), typing.get_args(schema)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_metavar(a) for a in args)
    if origin is typing.Literal:
        return "|".join(map(str, args))
    if origin is dict:
        return f"{{{_metavar(args[0])}: {_metavar(args[1])}}}"
    if origin in (tuple, list):
        return f"[{', '.join('...' if a is ... else _metavar(a) for a in args)}]"
    if schema is bool:
        return "true|false"
    return "null" if schema is type(None) else schema.__name__.upper()
