"""Tokens -> batches: random windows for training, consecutive ones for validation.

Where a training row begins is a hash of (seed, step, row). So step 1000 can be had without the 999 before
it, on any number of hosts, and a resumed run sees the very batches that an uninterrupted one would have.

    start = splitmix64(splitmix64(splitmix64(seed) + step) + row) mod (number of windows)   (Steele et al. 2014)

Shapes: B batch, T sequence_length. A row holds T + 1 tokens: inputs are `row[:-1]`, targets `row[1:]`.
"""

from collections.abc import Iterator

import numpy as np

from ..errors import DataError


class Batches:
    """An endless iterator over training batches, uint8 of shape (B, T + 1); see `batches`."""

    def __init__(self, tokens: np.ndarray, *, batch_size: int, sequence_length: int, seed: int, start_step: int = 0):
        _check(tokens, batch_size, sequence_length)
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0, but got {start_step}.")
        self.tokens, self.step = tokens, start_step
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed

    def __iter__(self):
        return self

    def __next__(self) -> np.ndarray:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def batch(self, step: int) -> np.ndarray:
        """Returns the batch of any step, without moving the iterator."""
        num_windows = len(self.tokens) - self.sequence_length
        starts = window_starts(self.seed, step, self.batch_size, num_windows)
        return self.tokens[starts[:, None] + np.arange(self.sequence_length + 1)]

    def state(self) -> dict[str, int]:
        """Returns what `restore` needs, as JSON-able numbers: the next step, and what the batches depend on."""
        return {
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "num_tokens": len(self.tokens),
        }

    def restore(self, state: dict[str, int]) -> None:
        """Continues where `state` was taken; raises `DataError` if these would be other batches."""
        ours = self.state()
        if set(state) != set(ours):
            raise DataError(f"The state of the data must have {sorted(ours)}, but it has {sorted(state)}.")
        changed = [f"{k} was {state[k]} and is {v}" for k, v in ours.items() if k != "step" and state[k] != v]
        if changed:
            raise DataError(
                f"The data is not what the run was started with: {', '.join(changed)}. "
                "Give the same text and data settings to resume, or start a new run."
            )
        self.step = state["step"]


def batches(tokens: np.ndarray, *, batch_size: int, sequence_length: int, seed: int, start_step: int = 0) -> Batches:
    """Returns an endless iterator over random windows of `tokens`, uint8 of shape (B, T + 1).

    The batch of a step depends on nothing but the arguments and the step.

    >>> it = batches(corpus.train, batch_size=16, sequence_length=256, seed=0)
    >>> inputs_BT, targets_BT = (b := next(it))[:, :-1], b[:, 1:]
    """
    return Batches(tokens, batch_size=batch_size, sequence_length=sequence_length, seed=seed, start_step=start_step)


def validation_batches(
    tokens: np.ndarray, *, batch_size: int, sequence_length: int, max_batches: int | None = None
) -> Iterator[np.ndarray]:
    """Yields the windows of `tokens` in order, uint8 of shape (B, T + 1), the same at every call.

    No token is predicted twice: a window's last token is the next one's first input. Windows that do not fill
    a batch are left out, unless they are all there is: then the only batch has fewer rows.
    """
    _check(tokens, batch_size, sequence_length)
    num_windows = (len(tokens) - 1) // sequence_length
    rows = min(batch_size, num_windows)
    for i in range(min(num_windows // rows, num_windows if max_batches is None else max_batches)):
        starts = sequence_length * np.arange(i * rows, (i + 1) * rows)
        yield tokens[starts[:, None] + np.arange(sequence_length + 1)]


def window_starts(seed: int, step: int, num_rows: int, num_windows: int) -> np.ndarray:
    """Returns where the rows of a step begin: int64 of shape (num_rows,), each below `num_windows`."""
    word = lambda x: np.asarray(x % 2**64, np.uint64)
    rows = np.arange(num_rows, dtype=np.uint64)
    hashes = _splitmix64(_splitmix64(_splitmix64(word(seed)) + word(step)) + rows)
    return (hashes % np.uint64(num_windows)).astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around silently, numpy scalars warn
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _check(tokens: np.ndarray, batch_size: int, sequence_length: int) -> None:
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have one axis, but have shape {tokens.shape}.")
    if batch_size < 1 or sequence_length < 1:
        raise ValueError(f"batch_size and sequence_length must be at least 1, but got {batch_size}, {sequence_length}.")
    if len(tokens) < sequence_length + 1:
        raise DataError(
            f"A row needs {sequence_length + 1} tokens (sequence_length + 1), but there are only {len(tokens)}: "
            "add text, or set a smaller data.sequence_length."
        )
