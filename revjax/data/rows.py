"""Documents -> rows of T + 1 tokens, without padding: one after another, cut where a row is full.

    tokens        .. a a a | S b b b b | S c c          S is the separator that begins a document (see `cache`)
    segment_ids      0 0 0   1 1 1 1 1   2 2 .          of the T inputs: a token attends to its own segment
    positions        0 1 2   0 1 2 3 4   0 1 .          a document that was cut begins anew in the next row

A row's last token is the next one's first: it is predicted in one, and predicts in the other. So every token is
predicted once, and the token after a document's last is a separator, which says nothing of the next one.
"""

import numpy as np

from .corpus import Text


class PackedRows:
    """The rows of a text, each made when it is asked for.

    Args:
      text: with at least T + 1 tokens.
      sequence_length: T.
      seed: of a random order of the documents; None keeps their order.
      separate_documents: whether rows have segment_ids and positions.

    A row is a dict of int32 arrays: tokens (T + 1,), segment_ids (T,), positions (T,), and weights (T,) where not every
    token is to be learned: 1 where the next token is, else 0.
    """

    def __init__(self, text: Text, sequence_length: int, *, seed: int | None, separate_documents: bool = True):
        order = slice(None)
        if seed is not None:  # RandomState, unlike Generator, promises to give the same numbers for ever
            order = np.random.RandomState(seed).permutation(text.num_documents)
        self.tokens, self.trained, self.starts = text.tokens, text.trained, text.starts[order]
        self.ends = np.cumsum(text.ends[order] - self.starts)  # in the order of the rows
        self.sequence_length, self.separate_documents = sequence_length, separate_documents

    def __len__(self) -> int:
        return (int(self.ends[-1]) - 1) // self.sequence_length

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        i, length = int(index), self.sequence_length
        if not 0 <= i < len(self):
            raise IndexError(f"Row {i} of {len(self)}.")
        first, last = i * length, (i + 1) * length + 1
        documents = range(*np.searchsorted(self.ends, [first, last - 1], side="right") + [0, 1])
        spans = []
        for d in documents:
            begins = int(self.ends[d - 1]) if d else 0
            low, high = max(first, begins) - begins, min(last, int(self.ends[d])) - begins
            spans.append(slice(self.starts[d] + low, self.starts[d] + high))
        row = {"tokens": np.concatenate([self.tokens[span] for span in spans]).astype(np.int32)}
        if self.trained is not None:
            row["weights"] = np.concatenate([self.trained[span] for span in spans])[1:].astype(np.int32)
        if self.separate_documents:
            lengths = [span.stop - span.start for span in spans]
            starts = np.cumsum([0, *lengths[:-1]])
            row["segment_ids"] = np.repeat(np.arange(len(spans), dtype=np.int32), lengths)[:-1]
            row["positions"] = (np.arange(length + 1) - np.repeat(starts, lengths))[:-1].astype(np.int32)
        return row
