"""Splits the words of a command line into files (or folders) and settings."""

from collections.abc import Sequence

from ..errors import ConfigError


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


def one_name(names: Sequence[str], usage: str) -> str:
    """The only one of `names`; raises `ConfigError` otherwise."""
    if len(names) != 1:
        raise ConfigError(f"Expected one name, but got {', '.join(names) or 'none'}. Write: {usage}")
    return names[0]
