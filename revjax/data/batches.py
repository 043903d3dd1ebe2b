"""Rows -> batches: an endless, shuffled mixture for training; all of a text in order for validation.

Which rows a batch has is a function of its number alone (grain's `MapDataset`). So step 1000 can be had without the
999 before it, and a resumed run sees the very batches that an uninterrupted one would have.

Shapes: B batch, T sequence_length.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from ..errors import DataError
from .corpus import Corpus, Text
from .rows import PackedRows

# Of text, int32: tokens (B, T + 1); segment_ids, positions, weights (B, T): see `PackedRows`.
Batch = dict[str, np.ndarray]


class RowBatches:
    """An endless iterator over training batches.

    Every source gives its rows in another order in each epoch of its own, and sources take turns by their shares.

    Args:
      sources: of rows, each a dict of arrays of one shape in all; with one row at least in each.
      shares: of the rows, of each source.
      batch_size: B, over all processes; each gets its part of every batch.
      seed: of all that is random.
      identity: what the batches depend on, as JSON has it.
      process: (index of this process, number of processes), which divides B.
    """

    sequence_length: int  # tokens of a row, as a model sees it

    def __init__(
        self,
        sources: Sequence[Any],
        shares: Sequence[float],
        *,
        batch_size: int,
        seed: int,
        identity: dict[str, Any],
        process: tuple[int, int] = (0, 1),
    ):
        index, count = process
        if batch_size % count:
            raise DataError(f"{count} processes must divide data.batch_size, but got {batch_size}.")
        self.batch_size, self.seed = batch_size, seed
        # Until every row of the source that lasts the shortest was given once.
        self.rows_per_epoch = min(len(rows) / share for rows, share in zip(sources, shares, strict=True))
        shuffled = [
            grain.MapDataset.source(rows).seed((seed + i) % 2**32).shuffle().repeat() for i, rows in enumerate(sources)
        ]
        mixed = grain.MapDataset.mix(shuffled, shares) if shuffled[1:] else shuffled[0]
        # Rows go on for ever. (For a remainder, grain counts in floats, and in batches of one row too far for an int.)
        self._dataset = mixed[index::count].batch(batch_size // count, drop_remainder=True)
        self._identity = identity
        self._iterator: Any = None
        self._move_to(0)

    def _move_to(self, step: int) -> None:
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = iter(self._dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
        self._iterator.set_state({"next_index": step})
        self.step = step

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def batch(self, step: int) -> Batch:
        """Returns the batch of any step, without moving the iterator."""
        return _some(self._dataset[step])

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs, as JSON-able values: the next step, and what the batches depend on."""
        return {"step": self.step, **self._identity}

    def restore(self, state: dict[str, Any], *, allow_change: bool = False) -> None:
        """Continues where `state` was taken; raises `DataError` if these would be other batches.

        With `allow_change` they may be: the next one is that of the same step.
        """
        if set(state) != set(self.state()):
            raise DataError(f"The state of the data must have {sorted(self.state())}, but it has {sorted(state)}.")
        changed = [f"{k} was {state[k]} and is {v}" for k, v in self._identity.items() if state[k] != v]
        if changed and not allow_change:
            raise DataError(
                f"The data is not what the run was started with: {', '.join(changed)}. "
                "Give the same text and data settings to resume, start a new run, or go on with other batches, "
                "--allow-change=data.source."
            )
        self._move_to(state["step"])

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._iterator.close()


class Batches(RowBatches):
    """Batches of text. See `RowBatches`.

    Args:
      corpus: with a row at least in each source.
      batch_size: B, over all processes; each gets its part of every batch.
      sequence_length: T.
      seed: of all that is random.
      separate_documents: whether batches have segment_ids and positions (see `PackedRows`).
      process: (index of this process, number of processes), which divides B.

    >>> it = Batches(corpus, batch_size=16, sequence_length=256, seed=0)
    >>> tokens = next(it)["tokens"]
    >>> inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        separate_documents: bool = True,
        process: tuple[int, int] = (0, 1),
    ):
        if batch_size < 1 or sequence_length < 1:
            raise ValueError(f"Sizes must be at least 1, but got {batch_size=} and {sequence_length=}.")
        self.sequence_length = sequence_length
        sources = [
            PackedRows(part.text, sequence_length, seed=(seed + i) % 2**32, separate_documents=separate_documents)
            for i, part in enumerate(corpus.train)
        ]
        identity = {
            "text": corpus.fingerprint,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "seed": seed,
        }
        shares = [part.weight for part in corpus.train]
        super().__init__(sources, shares, batch_size=batch_size, seed=seed, identity=identity, process=process)


def batch_shapes(
    batch_size: int, sequence_length: int, *, separate_documents: bool = True, weights: bool = False
) -> dict[str, tuple]:
    """The shape of each array of a batch; all are int32."""
    rows, inputs = (batch_size, sequence_length + 1), (batch_size, sequence_length)
    more = (["weights"] if weights else []) + (["segment_ids", "positions"] if separate_documents else [])
    return {"tokens": rows} | {name: inputs for name in more}


def validation_batches(
    text: Text,
    *,
    batch_size: int,
    sequence_length: int,
    separate_documents: bool = True,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Yields the rows of `text` in order, the same at every call; no token is predicted twice.

    Rows that do not fill a batch are left out, unless they are all there is: then the only batch has fewer rows.
    """
    if text.num_tokens < sequence_length + 1:
        raise DataError(
            f"A row needs {sequence_length + 1} tokens (sequence_length + 1), but there are only {text.num_tokens}: "
            "add text, or set a smaller data.sequence_length."
        )
    rows = PackedRows(text, sequence_length, seed=None, separate_documents=separate_documents)
    yield from in_order(rows, batch_size, max_batches, drop_remainder=True)


def in_order(rows: Any, batch_size: int, max_batches: int | None, *, drop_remainder: bool) -> Iterator[Batch]:
    """Yields `rows` in their order. Where there are fewer than `batch_size`, they are the only batch."""
    dataset = grain.MapDataset.source(rows).batch(min(batch_size, len(rows)), drop_remainder=drop_remainder)
    for i in range(min(len(dataset), sys.maxsize if max_batches is None else max_batches)):
        yield _some(dataset[i])


def _some(batch: Batch | None) -> Batch:
    assert batch is not None  # grain's may be, after a filter
    return batch
