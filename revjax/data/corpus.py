"""Sources -> texts to train on and texts held out.

A document is held out by a hash of its text: so the split depends neither on the order of documents nor on which
others there are, and what is there twice is on one side only.
"""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from ..config import users_cache
from ..errors import DataError
from .cache import TokenCache, cached_tokens
from .chat import load_template
from .config import DataConfig
from .files import find_files
from .tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """Some of the documents of a cache, each with the separator."""

    tokens: np.ndarray  # of the whole cache
    starts: np.ndarray  # int64, of shape (number of documents,): where they are among `tokens`
    ends: np.ndarray
    num_bytes: int  # of text that is learned, without separators
    trained: np.ndarray | None = None  # of the whole cache: 1 for each token that is learned, else 0; None: all are

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        return int(np.sum(self.ends - self.starts))

    @property
    def num_trained(self) -> int:
        """Tokens that are learned."""
        if self.trained is None:
            return self.num_tokens
        return sum(int(np.count_nonzero(self.trained[a:b])) for a, b in zip(self.starts, self.ends, strict=True))

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_trained


@dataclasses.dataclass(frozen=True)
class Part:
    """A text with a name and a weight."""

    name: str
    text: Text
    weight: float  # weights add up to 1


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All that is trained on."""

    train: tuple[Part, ...]  # a part for each source; weights are shares of the rows
    validation: tuple[Part, ...]  # what is held out of each source, then data.validation (which weighs 0 beside these)
    tokenizer: Tokenizer
    fingerprint: str  # another one for other documents, tokens or shares to train on

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token that is trained on."""
        return sum(part.weight * part.text.bytes_per_token for part in self.train)


def find_texts(config: DataConfig) -> dict[str, list[pathlib.Path]]:
    """The files of each source of `config`; raises `DataError` where there are none. Reads nothing."""
    return {source: find_files(source) for source in [*config.sources, *config.validation.values()]}


def load_corpus(
    config: DataConfig, tokenizer: Tokenizer | None = None, files: dict[str, list[pathlib.Path]] | None = None
) -> Corpus:
    """Returns the text of `config`, tokenised; the same for the same files on any machine and in any process.

    The `tokenizer` is that of `config` and the `files` are `find_texts(config)`, unless they are given. Raises
    `DataError` where there is nothing to read, where a file may not be read, and where a split is too short for one
    row.

    >>> corpus = load_corpus(DataConfig(source="python-stdlib"))
    """
    tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
    folder = users_cache("tokens") if config.cache == "auto" else config.cache
    files = find_texts(config) if files is None else files
    template = load_template(config)
    load = lambda source: cached_tokens(
        files[source], tokenizer, text_field=config.text_field, folder=folder, template=template
    )
    total, train, validation = sum(config.sources.values()), [], []
    identity: list = [config.validation_fraction]
    for name, share in config.sources.items():
        cache, weight = load(name), share / total
        chosen, held_out = split(cache, config.validation_fraction)
        _check_length(chosen, "training", name, config)
        train.append(Part(name, chosen, weight))
        if config.validation_fraction:
            _check_length(held_out, "validation", name, config)
            validation.append(Part(name, held_out, weight))
        identity.append([cache.key, weight])
    weight = 0.0 if validation else 1 / max(len(config.validation), 1)
    for name, source in config.validation.items():
        text, _ = split(load(source), 0.0)
        _check_length(text, "validation", source, config)
        validation.append(Part(name, text, weight))
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    return Corpus(tuple(train), tuple(validation), tokenizer, fingerprint)


def split(cache: TokenCache, fraction: float) -> tuple[Text, Text]:
    """(what to train on, what is held out): documents whose hash is below `fraction` are held out.

    That is at least one where there are two, and never all. Where there is one, its end is held out.
    """
    ends, sizes = cache.documents["end"], np.diff(cache.documents["bytes"], prepend=0)
    starts = np.concatenate([[0], ends[:-1]])
    text = lambda chosen: Text(cache.tokens, starts[chosen], ends[chosen], int(sizes[chosen].sum()), cache.trained)
    if not fraction:
        return text(slice(None)), text(slice(0))
    if len(ends) == 1:
        cut = round(int(ends[0]) * (1 - fraction))
        first_bytes = round(int(sizes[0]) * (1 - fraction))
        first = Text(cache.tokens, starts, np.array([cut]), first_bytes, cache.trained)
        return first, Text(cache.tokens, np.array([cut]), ends, int(sizes[0]) - first_bytes, cache.trained)
    hashes = cache.documents["hash"] / 2**64
    count = min(max(int(np.sum(hashes < fraction)), 1), len(ends) - 1)
    is_held_out = np.zeros(len(ends), bool)
    is_held_out[np.argsort(hashes, kind="stable")[:count]] = True
    return text(~is_held_out), text(is_held_out)


def _check_length(text: Text, split: str, source: str, config: DataConfig) -> None:
    if text.num_tokens < config.sequence_length + 1:
        raise DataError(
            f"The {split} text of {source!r} has {text.num_tokens} tokens, but one row needs "
            f"{config.sequence_length + 1} (sequence_length + 1): add text, or set a smaller data.sequence_length"
            f"{' or a larger data.validation_fraction' if split == 'validation' else ''}."
        )
