"""The text of `--help`, from the types, comments and defaults of a dataclass."""

import contextlib
import io
import typing

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from .files import dump
from .schema import type_name

_HOW = """\
Each field can be set by --section.field=VALUE, in a YAML file, or by the environment
variable REVJAX__SECTION__FIELD=VALUE. The command line wins over the environment, which
wins over files. Values are written as in YAML: null, true, 1e-3, [1, 2]."""


def help_text(schema: type, *, prog: str, description: str = "") -> str:
    """Returns what `prog --help` prints: each field of `schema` with its type, comment and default."""
    registry, out = ConstructorRegistry(), io.StringIO()
    registry.primitive_rule(_written_as_yaml)
    with registry, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(
            schema,
            args=["--help"],
            prog=prog,
            description=f"{description}\n\n{_HOW}".strip(),
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    return out.getvalue()


def _written_as_yaml(info):
    """tyro would show lists as several words and dicts as pairs: show them as `load` reads them."""
    if typing.get_origin(info.type) not in (tuple, list, dict):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=type_name(info.type),
        instance_from_str=lambda words: yaml.safe_load(words[0]),
        is_instance=lambda x: isinstance(x, tuple | list | dict),
        str_from_instance=lambda x: [dump(x).strip()],
    )
