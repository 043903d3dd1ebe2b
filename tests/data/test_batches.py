"""A batch is a function of seed and step; epochs see every row; validation predicts each token once."""

import collections
import json

import jax
import numpy as np
import pytest

from revjax.data import Batches, batch_shapes, validation_batches
from revjax.errors import DataError

from .texts import make_corpus, make_text

TOKENS = np.random.default_rng(0).integers(0, 256, 1001, np.uint8)
TEXT = make_text(TOKENS, [1] * 20 + [81] * 12 + [9])
SIZES = {"batch_size": 4, "sequence_length": 16}


def make(text=TEXT, **changes):
    return Batches(make_corpus(text), **{**SIZES, "seed": 5} | changes)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_a_batch_has_tokens_segments_and_positions():
    shapes = {name: x.shape for name, x in next(make()).items()}
    assert shapes == batch_shapes(**SIZES) == {"tokens": (4, 17), "segment_ids": (4, 16), "positions": (4, 16)}
    shapes = {name: x.shape for name, x in next(make(separate_documents=False)).items()}
    assert shapes == batch_shapes(**SIZES, separate_documents=False) == {"tokens": (4, 17)}


def test_the_order_of_rows_is_pinned():
    """These numbers never change, or a resumed run would see other data than it was started with."""
    batches = make(make_text(np.arange(161)), sequence_length=4, seed=0)
    rows = [(b["tokens"][:, 0] // 4).tolist() for b in map(batches.batch, (0, 1, 10, 11))]
    assert rows == [
        [21, 37, 31, 14],
        [9, 7, 28, 6],
        [24, 23, 1, 36],
        [2, 25, 3, 33],
    ]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_rows_come_in_the_same_order_whatever_the_size_of_a_batch(size):
    rows = lambda batches, n: np.concatenate([next(batches)["tokens"] for _ in range(n)])
    np.testing.assert_array_equal(rows(make(batch_size=size), 24 // size), rows(make(), 6))
    assert make(batch_size=size).batch(10**9)["tokens"].shape == (size, 17)


@pytest.mark.parametrize("step", [0, 1, 7, 100_000])
def test_a_run_resumed_at_any_step_sees_the_same_batches(step):
    straight = make()
    for _ in range(min(step, 7)):
        next(straight)
    if step > 7:
        straight.restore(straight.state() | {"step": step})
    state = json.loads(json.dumps(straight.state()))
    resumed = make()
    next(resumed)
    resumed.restore(state)
    for i in range(3):
        expected = next(straight)
        assert equal(next(resumed), expected) and equal(make().batch(step + i), expected)
        assert resumed.state() == straight.state() and resumed.state()["step"] == step + i + 1


def test_an_epoch_is_every_row_once_in_another_order():
    batches = make(make_text(np.arange(161)), sequence_length=4)
    assert batches.rows_per_epoch == 40
    epochs = [np.concatenate([next(batches)["tokens"][:, 0] for _ in range(10)]) for _ in range(3)]
    assert all(sorted(epoch) == list(range(0, 160, 4)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_sources_take_turns_by_their_shares():
    texts = [make_text(np.full(1000, i)) for i in range(3)]
    batches = Batches(make_corpus(*texts, weights=[0.5, 0.3, 0.2]), batch_size=10, sequence_length=9, seed=0)
    for _ in range(40):  # several epochs of the first
        counts = collections.Counter(next(batches)["tokens"][:, 0].tolist())
        assert counts == {0: 5, 1: 3, 2: 2}


def test_processes_have_their_parts_of_the_same_batches():
    whole, parts = make(), [make(process=(i, 2)) for i in range(2)]
    for _ in range(3):
        rows = np.concatenate([next(part)["tokens"] for part in parts])
        assert sorted(map(bytes, rows)) == sorted(map(bytes, next(whole)["tokens"]))
    with pytest.raises(DataError, match="3 processes must divide data.batch_size, but got 4"):
        make(process=(0, 3))


def test_seeds_and_steps_differ():
    batches = make()
    assert not equal(batches.batch(0), batches.batch(1)) and not equal(batches.batch(0), make(seed=6).batch(0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"batch_size": 8}, "batch_size was 4 and is 8"),
        ({"text": make_text(TOKENS[:-1])}, "text was .* and is"),
    ],
)
def test_restoring_into_other_data_is_an_error_unless_it_is_allowed(change, message):
    state = make().state() | {"step": 3}
    other = make(**change)
    with pytest.raises(DataError, match=message):
        other.restore(state)
    other.restore(state, allow_change=True)
    assert equal(next(other), other.batch(3))


def test_a_state_of_something_else_is_an_error():
    with pytest.raises(DataError, match="must have"):
        make().restore({"next_index": 3})


def test_validation_predicts_each_token_at_most_once_and_is_the_same_at_every_call():
    once, again = (list(validation_batches(TEXT, **SIZES)) for _ in range(2))
    assert equal(once, again)
    targets = np.concatenate([b["tokens"][:, 1:].ravel() for b in once])
    assert np.array_equal(targets, TOKENS[1 : 1 + len(targets)])
    assert len(targets) == (1000 // 16) // 4 * 4 * 16


def test_validation_of_less_than_a_batch_is_one_smaller_batch():
    assert [b["tokens"].shape for b in validation_batches(make_text(TOKENS[:40]), **SIZES)] == [(2, 17)]


def test_validation_stops_at_max_batches():
    assert len(list(validation_batches(TEXT, **SIZES, max_batches=2))) == 2


def test_too_few_tokens_for_a_row_are_an_error():
    with pytest.raises(DataError, match="needs 17 tokens.*only 16"):
        next(validation_batches(make_text(TOKENS[:16]), **SIZES))


def test_exactly_one_row_is_enough():
    assert (next(make(make_text(TOKENS[:17])))["tokens"] == TOKENS[:17]).all()
