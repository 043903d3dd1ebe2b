"""A batch is a function of seed and step; validation predicts each token once."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revjax.data import batches, validation_batches
from revjax.data.batches import window_starts
from revjax.errors import DataError

TOKENS = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
SIZES = {"batch_size": 4, "sequence_length": 16}


def test_rows_are_windows_of_the_tokens():
    batch = next(batches(TOKENS, **SIZES, seed=0))
    assert batch.shape == (4, 17) and batch.dtype == np.uint8
    windows = np.lib.stride_tricks.sliding_window_view(TOKENS, 17)
    for row in batch:
        assert (windows == row).all(axis=1).any()


def test_the_hash_is_pinned():
    """These numbers never change, or a resumed run would see other data than it was started with."""
    assert window_starts(0, 0, 4, 10**6).tolist() == [252433, 20899, 93999, 3556]


def test_splitmix64_is_the_published_one():
    from revjax.data.batches import _splitmix64

    assert int(_splitmix64(np.uint64(1234567))[0]) == 6457827717110365317  # the reference implementation's first


@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 10**9), num_windows=st.integers(1, 10**12))
def test_starts_are_in_range_for_any_seed_and_step(seed, step, num_windows):
    starts = window_starts(seed, step, 8, num_windows)
    assert ((0 <= starts) & (starts < num_windows)).all()


def test_starts_are_spread_evenly():
    counts = np.bincount(np.concatenate([window_starts(3, step, 64, 10) for step in range(1000)]), minlength=10)
    assert abs(counts / 6400 - 1).max() < 0.05  # 4 standard deviations


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_run_resumed_at_any_step_sees_the_same_batches(step):
    straight = batches(TOKENS, **SIZES, seed=5)
    for _ in range(step):
        next(straight)
    state = json.loads(json.dumps(straight.state()))
    resumed = batches(TOKENS, **SIZES, seed=5)
    resumed.restore(state)
    jumped = batches(TOKENS, **SIZES, seed=5, start_step=step)
    for _ in range(3):
        expected = next(straight)
        assert (next(resumed) == expected).all() and (next(jumped) == expected).all()


def test_seeds_and_steps_differ():
    it = batches(TOKENS, **SIZES, seed=0)
    assert not (it.batch(0) == it.batch(1)).all()
    assert not (it.batch(0) == batches(TOKENS, **SIZES, seed=1).batch(0)).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"batch_size": 8}, "batch_size was 4 and is 8"),
        ({"tokens": TOKENS[:-1]}, "num_tokens was 1000 and is 999"),
    ],
)
def test_restoring_into_other_data_is_an_error(change, message):
    state = batches(TOKENS, **SIZES, seed=5).state()
    other = batches(**{"tokens": TOKENS, **SIZES, "seed": 5, **change})
    with pytest.raises(DataError, match=message):
        other.restore(state)


def test_a_state_of_something_else_is_an_error():
    with pytest.raises(DataError, match="must have"):
        batches(TOKENS, **SIZES, seed=0).restore({"next_index": 3})


def test_validation_predicts_each_token_at_most_once_and_is_the_same_at_every_call():
    once, again = (list(validation_batches(TOKENS, **SIZES)) for _ in range(2))
    assert np.array_equal(once, again)
    targets = np.concatenate([b[:, 1:].ravel() for b in once])
    assert np.array_equal(targets, TOKENS[1 : 1 + len(targets)])
    assert len(targets) == (999 // 16) // 4 * 4 * 16


def test_validation_of_less_than_a_batch_is_one_smaller_batch():
    assert [b.shape for b in validation_batches(TOKENS[:40], **SIZES)] == [(2, 17)]


def test_validation_stops_at_max_batches():
    assert len(list(validation_batches(TOKENS, **SIZES, max_batches=2))) == 2


def test_too_few_tokens_for_a_row_are_an_error():
    with pytest.raises(DataError, match="needs 17 tokens.*only 16"):
        batches(TOKENS[:16], **SIZES, seed=0)
    with pytest.raises(DataError, match="needs 17 tokens.*only 16"):
        next(validation_batches(TOKENS[:16], **SIZES))


def test_exactly_one_window_is_enough():
    assert (next(batches(TOKENS[:17], **SIZES, seed=0)) == TOKENS[:17]).all()
