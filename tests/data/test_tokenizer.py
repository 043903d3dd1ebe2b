"""Bytes are tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revjax.data import ByteTokenizer


@given(st.text())
def test_any_text_comes_back(text):
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.uint8 and ByteTokenizer().decode(ids) == text


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_decode(ids):
    assert ByteTokenizer().decode(ids) == bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("ids", [[256], [-1], [[1, 2]]])
def test_what_is_not_a_byte_is_an_error(ids):
    with pytest.raises(ValueError, match="from 0 to 255"):
        ByteTokenizer().decode(ids)
