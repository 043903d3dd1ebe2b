"""Local text -> tokens for training and, from other files, for validation.

Files are held out by a hash of their name, so that the split depends neither on the order of a directory
nor on which other files there are: a file added later moves no other file from one side to the other.
"""

import dataclasses
import glob
import hashlib
import os
import pathlib
import sysconfig

import numpy as np

from ..errors import DataError
from ..logging import get_logger

STDLIB = "python-stdlib"
END_OF_FILE = 0  # a byte that text does not contain; it follows each file
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on, and how it is cut."""

    source: str = STDLIB  # a file, a folder, a glob ("notes/**/*.md"), or python-stdlib: the running Python's library
    sequence_length: int = 256  # tokens that each row predicts
    batch_size: int = 16  # rows of one step, over all devices
    validation_fraction: float = 0.05  # share of the files held out (of the bytes, where there is one file)

    def __post_init__(self):
        for name in ("sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), but got {self.validation_fraction}.")
        if not self.source:
            raise ValueError(f"source must be a file, a folder, a glob or {STDLIB!r}, but got ''.")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens, uint8 of shape (number of bytes,): files in order of name, each followed by `END_OF_FILE`."""

    train: np.ndarray
    validation: np.ndarray
    train_files: tuple[str, ...]  # relative to the source
    validation_files: tuple[str, ...]


def load_corpus(config: DataConfig) -> Corpus:
    """Returns the text of `config.source`, the same for the same files on any machine and in any process.

    Files that are not UTF-8 are left out, with a warning that counts them. Raises `DataError` where there is
    nothing to read, where a file may not be read, and where a split is too short for one row.

    >>> corpus = load_corpus(DataConfig(source="python-stdlib"))
    """
    texts = _read_all(*_find(config.source), config.source)
    if not any(texts.values()):
        raise DataError(f"No text under {config.source!r}: all {len(texts)} files are empty.")
    if len(texts) == 1 and config.validation_fraction:
        (name,), (text,) = texts.keys(), texts.values()
        cut = round(len(text) * (1 - config.validation_fraction))
        train, held_out = {name: text[:cut]}, {name: text[cut:]}
    else:
        held_out = {name: texts[name] for name in _held_out(list(texts), config.validation_fraction)}
        train = {name: text for name, text in texts.items() if name not in held_out}
    corpus = Corpus(_tokens(train), _tokens(held_out), tuple(train), tuple(held_out))
    for split, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        wanted = split == "training" or config.validation_fraction > 0
        if wanted and len(tokens) < config.sequence_length + 1:
            raise DataError(
                f"The {split} text of {config.source!r} has {len(tokens)} tokens, but one row needs "
                f"{config.sequence_length + 1} (sequence_length + 1): add text, or set a smaller data.sequence_length"
                f"{' or a larger data.validation_fraction' if split == 'validation' else ''}."
            )
    return corpus


def _find(source: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Returns the folder that names are relative to, and the files, sorted."""
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        return root, [p for p in _files(root, "*.py") if not _NOT_STDLIB & set(p.relative_to(root).parts)]
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path, [p for p in _files(path, "*") if not any(part[0] == "." for part in p.relative_to(path).parts)]
    if path.exists():
        return path.parent, [path]
    if not glob.has_magic(source):
        raise DataError(
            f"There is no file or folder {source!r} (data.source), seen from {os.getcwd()}. "
            f"Give a path or a glob, or {STDLIB!r} for the Python standard library."
        )
    fixed = path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))]
    found = (pathlib.Path(p) for p in glob.glob(str(path), recursive=True))
    return pathlib.Path(*fixed), sorted(p for p in found if p.is_file())


def _files(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    return sorted(p for p in folder.rglob(pattern) if p.is_file())


def _read_all(root: pathlib.Path, paths: list[pathlib.Path], source: str) -> dict[str, bytes]:
    """Returns the UTF-8 files among `paths`, by name relative to `root`."""
    texts, skipped = {}, []
    for path in paths:
        try:
            text = path.read_bytes()
            text.decode("utf-8")
        except UnicodeDecodeError:
            skipped.append(path)
        except OSError as e:
            raise DataError(
                f"Cannot read {path}: {e.strerror}. Check its permissions, or narrow data.source."
            ) from None
        else:
            texts[path.relative_to(root).as_posix()] = text
    if not texts:
        found = f"{len(paths)} files there are not UTF-8 text" if paths else "no file is there"
        raise DataError(f"No text for data.source {source!r}: {found}.")
    if skipped:
        get_logger(__name__).warning("left out %d files that are not UTF-8 text, such as %s", len(skipped), skipped[0])
    return texts


def _held_out(names: list[str], fraction: float) -> list[str]:
    """Returns the names whose hash is below `fraction`: at least one where there are two, and never all."""
    if not fraction or len(names) < 2:
        return []
    by_hash = sorted(names, key=_unit_hash)
    count = sum(_unit_hash(name) < fraction for name in names)
    return sorted(by_hash[: min(max(count, 1), len(names) - 1)])


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def _tokens(texts: dict[str, bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(text + bytes([END_OF_FILE]) for text in texts.values()), np.uint8)
