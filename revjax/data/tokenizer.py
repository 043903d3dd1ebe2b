"""Text <-> tokens: bytes, or whatever a tokenizer.json says.

Between two documents stands one token, the separator: a model that reads it begins a document, and one that says it
has ended one. Some tokenizers have tokens of their own for the beginning (<s>, <bos>); then documents begin with these,
and end with the separator.
"""

import codecs
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..errors import DataError, nearest
from .config import BYTES, DataConfig
from .documents import Documents
from .files import find_files

BYTE_0 = chr(256)  # how a tokenizer.json for bytes writes the separator
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of revjax asks of a tokenizer."""

    vocab_size: int  # tokens are below it
    separator: int  # the token between documents
    begin: tuple[int, ...]  # the tokens that begin a document; () where the separator does
    fingerprint: str  # another one for whatever gives other tokens

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of `text`, int32 of shape (number of tokens,), and no separator."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, in parallel where that is possible."""
        ...

    def encode_marked_up(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_batch`, but what spells a special token is that token; with the character where each starts."""
        ...

    def decode(self, tokens: Iterable[int] | np.ndarray) -> str:
        """Returns the text of `tokens`; a character that is cut off becomes U+FFFD."""
        ...

    def stream(self, prompt: Sequence[int] = ()) -> Callable[[Sequence[int], bool], str]:
        """Returns `decode(tokens, is_last)` for tokens that come bit by bit after those of `prompt`.

        It gives the text that is complete: no half of a character.
        """
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255. Nothing to train or to download, and a byte that text does not have, 0, between
    documents.

    >>> ByteTokenizer().encode("né")
    array([110, 195, 169], dtype=int32)
    """

    vocab_size = 256
    separator = 0
    begin = ()
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of `text`, int32 of shape (number of bytes,)."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode_marked_up(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        sizes = lambda text: [len(character.encode("utf-8")) for character in text]
        return [
            (tokens, np.repeat(np.arange(len(text)), sizes(text)))
            for text, tokens in zip(texts, self.encode_batch(texts), strict=True)
        ]

    def decode(self, tokens: Iterable[int] | np.ndarray) -> str:
        return self.stream()(list(tokens), True)

    def stream(self, prompt: Sequence[int] = ()) -> Callable[[Sequence[int], bool], str]:
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

        def step(tokens, is_last):
            known = [token for token in tokens if token <= 255]  # a model may know more
            return decode(bytes(known), is_last)

        return step


def byte_tokenizer_json() -> str:
    """The contents of a tokenizer.json that gives the tokens of `ByteTokenizer`, for tools that need a file.

    Its vocabulary has a character for each byte, as GPT-2's has: the printable ones themselves, the others from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE({c: byte for byte, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return tokenizer.to_str(pretty=True)


def special_token(path: pathlib.Path, text: str) -> int | None:
    """The token that `text` is in the tokenizer.json at `path`; None where there is none, or no such file."""
    try:
        return tokenizers.Tokenizer.from_file(str(path)).token_to_id(text)
    except Exception:  # tokenizers raises nothing more special; whoever loads the tokenizer says what is wrong
        return None


class FileTokenizer:
    """A tokenizer.json, as Hugging Face's `tokenizers` writes it.

    Text is text: where it spells a special token, it is not that token.

    Args:
      path: of the file.
      separator: the token between documents; None takes the first of `SEPARATORS` that there is.
      setting: what a user would set it with.

    Raises `DataError` where the file cannot be read, or has no such token.
    """

    def __init__(self, path: str | pathlib.Path, separator: str | None = None, *, setting: str = "--data.separator"):
        path = pathlib.Path(path).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            self.file = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.file)
        except OSError as e:
            make = f" To make one of your own text: revjax tokenizer train TEXT --vocab_size=4096 --output={path}"
            hint = nearest(str(path), [BYTES]) or (make if isinstance(e, FileNotFoundError) else "")
            raise DataError(f"Cannot read the tokenizer {path} (data.tokenizer): {e.strerror}.{hint}") from None
        except Exception as e:  # tokenizers raises nothing more special
            raise DataError(f"{path} (data.tokenizer) is not a tokenizer.json: {e}.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.separator = self._separator(path, separator, setting)
        self.begin = self._begin()
        marks = str(self.separator) + str(self.begin or "")
        self.fingerprint = hashlib.sha256(self.file + b"\0" + marks.encode()).hexdigest()

    def _separator(self, path: pathlib.Path, wanted: str | None, setting: str) -> int:
        for name in SEPARATORS if wanted is None else (wanted,):
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return token
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        usual = f"none of the usual tokens between documents ({', '.join(SEPARATORS)})"
        raise DataError(
            f"{path} has {usual if wanted is None else f'no token {wanted!r}'}. Set {setting} to one that it has"
            f"{': ' + ', '.join(special[:8]) if special else ''}."
        )

    def _begin(self) -> tuple[int, ...]:
        """What the file's post-processor puts before a text."""
        text, framed = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        where = next((i for i in range(len(framed)) if framed[i : i + len(text)] == text), 0)
        return tuple(framed[:where])

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def encode_marked_up(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        with_special = tokenizers.Tokenizer.from_buffer(self.file)
        with_special.no_truncation()
        with_special.no_padding()
        encoded = with_special.encode_batch(list(texts), add_special_tokens=False)
        starts = lambda e: np.array([first for first, _ in e.offsets], np.int64)
        return [(np.asarray(e.ids, np.int32), starts(e)) for e in encoded]

    def decode(self, tokens: Iterable[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def stream(self, prompt: Sequence[int] = ()) -> Callable[[Sequence[int], bool], str]:
        stream, waiting = decoders.DecodeStream(skip_special_tokens=True), []
        for token in prompt:
            stream.step(self._tokenizer, int(token))

        def step(tokens, is_last):
            text = ""
            for token in tokens:
                waiting.append(token)
                piece = stream.step(self._tokenizer, int(token))
                if piece is not None:
                    text += piece
                    waiting.clear()
            return text + self.decode(waiting) if is_last else text  # what is left is the half of a character

        return step


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of `config`; raises `DataError` where there is none."""
    return ByteTokenizer() if config.tokenizer == BYTES else FileTokenizer(config.tokenizer, config.separator)


def train_tokenizer(source: str, vocab_size: int, *, text_field: str = "text", show_progress: bool = False) -> str:
    """Returns a byte-level BPE for the text of `source` as the contents of a tokenizer.json.

    Its last token is the separator, <|endoftext|>. Any text can be written in it, since its first tokens are bytes.
    Raises `DataError` where there is no text, and where it does not have so many tokens to learn.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 1
    if vocab_size < smallest:
        raise DataError(f"vocab_size must be at least {smallest}: 256 bytes and the separator, but got {vocab_size}.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=show_progress)  # pyright: ignore
    documents = Documents(find_files(source), text_field)
    tokenizer.train_from_iterator((piece.text for piece in documents), trainer)
    documents.tell_left_out()
    tokenizer.add_special_tokens([SEPARATORS[0]])
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"The text of {source!r} gives only {tokenizer.get_vocab_size()} tokens, not {vocab_size}: "
            "add text, or ask for fewer."
        )
    return tokenizer.to_str(pretty=True)
