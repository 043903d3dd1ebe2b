"""Which text to train on, and how it is cut."""

import dataclasses
from typing import Literal

STDLIB = "python-stdlib"  # a source: the library of the Python that runs
BYTES = "bytes"  # a tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on, and how it is cut."""

    kind: Literal["text"] = "text"
    # A file, a folder, a glob ("notes/**/*.md"), or python-stdlib: the running Python's library. Several, each with its
    # share of the rows: {notes/: 3, web/*.jsonl.gz: 1}. Text, .jsonl, .parquet, and folders of Hugging Face datasets.
    source: dict[str, float] | str = STDLIB
    tokenizer: str = BYTES  # bytes, or the path of a tokenizer.json
    separator: str | None = None  # the token between documents; null is the tokenizer's own (<|endoftext|>, </s>, ...)
    text_field: str = "text"  # of .jsonl, .parquet and datasets: where the text of a row is
    # Conversations instead of texts, rows of [{role: user, content: ...}, ...]: the template that writes them, a .jinja
    # file, a tokenizer_config.json or a folder with one. Only what the assistant says is learned. null: texts
    chat_template: str | None = None
    sequence_length: int = 256  # tokens that each row predicts
    batch_size: int = 16  # rows of one step, over all devices
    separate_documents: bool = True  # no attention across documents that share a row, positions from 0 in each
    validation_fraction: float = 0.05  # share of the documents held out (of the tokens, where there is one document)
    validation: dict[str, str] = dataclasses.field(default_factory=dict)  # more texts to evaluate on: {prose: books/}
    cache: str = "auto"  # folder of tokenised texts; auto is the user's cache

    def __post_init__(self):
        for name in ("sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), but got {self.validation_fraction}.")
        for name in ("tokenizer", "text_field", "cache"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty.")
        if not self.source or not all(self.sources):
            raise ValueError(f"source must be a file, a folder, a glob or {STDLIB!r}, but got {self.source!r}.")
        for source, weight in self.sources.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"source: the share of {source!r} must be above 0, but got {weight}.")

    @property
    def sources(self) -> dict[str, float]:
        """Each source with its share of the rows."""
        return self.source if isinstance(self.source, dict) else {self.source: 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to train: byte-level BPE, which can write any text."""

    vocab_size: int = 8192  # tokens, with 256 bytes and the separator
    output: str = "tokenizer.json"  # where it goes; a file that is there stays
    text_field: str = "text"  # of .jsonl, .parquet and datasets: where the text of a row is
