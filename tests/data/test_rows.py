"""Rows hold every token once, and tell the documents in them apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revjax.data import PackedRows

from .texts import make_text

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def numbered(lengths):
    return make_text(np.arange(sum(lengths)), lengths)  # every token is another one


@given(lengths=lengths, length=st.integers(1, 20), seed=st.none() | st.integers(0, 2**32 - 1))
def test_every_token_is_an_input_once_and_segments_are_documents(lengths, length, seed):
    """Checked against documents laid out one by one, in whatever order they came."""
    text = numbered(lengths)
    if text.num_tokens < length + 1:
        return
    rows = PackedRows(text, length, seed=seed)
    got = [rows[i] for i in range(len(rows))]
    assert len(got) == (text.num_tokens - 1) // length
    stream = np.concatenate([row["tokens"][:-1] for row in got] + [got[-1]["tokens"][-1:]])
    assert len(set(stream.tolist())) == len(stream)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for a, b in zip(got, got[1:]):
        assert a["tokens"][-1] == b["tokens"][0]
    for row in got:
        inputs = row["tokens"][:-1]
        same_segment = row["segment_ids"][:, None] == row["segment_ids"][None]
        assert (same_segment == (document_of[inputs][:, None] == document_of[inputs][None])).all()
        for segment in set(row["segment_ids"].tolist()):
            inside = row["segment_ids"] == segment
            assert (row["positions"][inside] == np.arange(inside.sum())).all()
            assert (np.diff(inputs[inside]) == 1).all()
        assert {x.dtype for x in row.values()} == {np.dtype("int32")}
    if seed is None:
        assert (stream == np.arange(len(stream))).all()


def test_the_order_of_documents_is_pinned():
    """These numbers never change, or a resumed run would see other data than it was started with."""
    rows = PackedRows(numbered([2, 3, 4, 5]), 13, seed=7)
    assert rows[0]["tokens"].tolist() == [5, 6, 7, 8, 2, 3, 4, 0, 1, 9, 10, 11, 12, 13]
    assert rows[0]["segment_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]


def test_without_separation_there_are_only_tokens():
    assert set(PackedRows(numbered([3, 4]), 2, seed=None, separate_documents=False)[0]) == {"tokens"}


def test_a_row_that_is_not_there_is_an_error():
    with pytest.raises(IndexError, match="Row 3 of 3"):
        PackedRows(numbered([7]), 2, seed=None)[3]
