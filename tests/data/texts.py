"""Texts made of arrays."""

import numpy as np

from revjax.data import ByteTokenizer, Corpus, Part, Text


def make_text(tokens, lengths=None) -> Text:
    """`tokens` as documents of these lengths, by default one."""
    ends = np.cumsum([len(tokens)] if lengths is None else lengths)
    return Text(tokens, np.concatenate([[0], ends[:-1]]), ends, int(ends[-1]))


def make_corpus(*texts: Text, weights=None) -> Corpus:
    weights = weights or [1 / len(texts)] * len(texts)
    parts = tuple(Part(f"text {i}", text, weight) for i, (text, weight) in enumerate(zip(texts, weights)))
    return Corpus(parts, (), ByteTokenizer(), f"{[(text.num_tokens, weight) for text, weight in zip(texts, weights)]}")
