"""Splits the words of a command line into files (or folders) and settings."""

from collections.abc import Sequence

from .. import experiment
from ..config import help_text, load
from ..errors import ConfigError, nearest


def leading_names(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words before the first option, and the rest."""
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return list(argv[:first]), list(argv[first:])


def take(words: list[str], *switches: str) -> bool:
    """Removes `switches` from `words`; returns whether one was there."""
    found = [word for word in words if word in switches]
    for word in found:
        words.remove(word)
    return bool(found)


def refuse_unknown(words: Sequence[str], options: Sequence[str], usage: str) -> None:
    """Raises `ConfigError` for a word that is neither a setting (--section.field=value) nor one of these options.

    Options that take a value are given with their "=".
    """
    names = [option.removesuffix("=") for option in options]
    for word in words:
        name, has_value, _ = word.partition("=")
        if name in options and has_value:
            raise ConfigError(f"{name} takes no value. Write: {usage}")
        is_option = word.startswith("--") and "." not in name and name not in names
        if is_option and ((hint := nearest(name, names)) or not has_value):
            raise ConfigError(f"There is no option {name}.{hint} Write: {usage}")


def run_help(paths: Sequence[str], settings: Sequence[str], *, prog: str, description: str) -> str:
    """What --help prints of a command that takes the configuration of a run: with the values of one that is given."""
    settings = [word for word in settings if "." in word.partition("=")[0]]  # the others are the command's own
    given = load(experiment.RunConfig, paths, settings) if paths or settings else None
    return help_text(experiment.RunConfig, prog=prog, description=description, default=given)


def one_name(names: Sequence[str], usage: str) -> str:
    """The only one of `names`; raises `ConfigError` otherwise."""
    if len(names) != 1:
        raise ConfigError(f"Expected one name, but got {', '.join(names) or 'none'}. Write: {usage}")
    return names[0]
