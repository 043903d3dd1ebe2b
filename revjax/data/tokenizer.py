"""Bytes as tokens: no vocabulary to train, nothing to download, and loss in bits per byte is loss per token."""

from collections.abc import Iterable

import numpy as np


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255.

    >>> ByteTokenizer().encode("né")
    array([110, 195, 169], dtype=uint8)
    """

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of `text`, uint8 of shape (number of bytes,)."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of byte values `ids`; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        if ids.ndim != 1 or ((ids < 0) | (ids > 255)).any():
            raise ValueError(f"ids must be a sequence of numbers from 0 to 255, but got {ids}.")
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
