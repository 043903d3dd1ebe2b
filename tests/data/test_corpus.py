"""Sources become texts to train on and texts held out, document by document, the same everywhere."""

import os
import subprocess
import sys

import numpy as np
import pytest

from revjax.data import DataConfig, load_corpus
from revjax.data.cache import TokenCache
from revjax.data.corpus import split
from revjax.errors import DataError


@pytest.fixture
def notes(tmp_path):
    """Forty files of eight bytes."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.md").write_text(f"note {i:02d}\n")
    return folder


def config(source, **changes):
    settings = {"source": str(source), "sequence_length": 4, "validation_fraction": 0.25}
    return DataConfig(**settings | {"cache": "auto"} | changes)


def documents(text):
    return [bytes(text.tokens[a:b]) for a, b in zip(text.starts, text.ends)]


def test_whole_documents_are_held_out(notes):
    corpus = load_corpus(config(notes))
    (train,), (held_out,) = corpus.train, corpus.validation
    both = documents(train.text) + documents(held_out.text)
    assert sorted(both) == [f"\0note {i:02d}\n".encode() for i in range(40)]
    assert 3 <= held_out.text.num_documents <= 20 and train.weight == held_out.weight == 1
    assert train.text.num_bytes == 8 * train.text.num_documents and corpus.bytes_per_token == pytest.approx(8 / 9)


def test_a_new_document_moves_no_other_and_the_same_text_is_on_one_side(notes):
    before = set(documents(load_corpus(config(notes)).validation[0].text))
    (notes / "new.md").write_text("a new note")
    for name in ("00", "01", "02", "03"):
        (notes / f"copy{name}.md").write_text(f"note {name}\n")
    corpus = load_corpus(config(notes))
    train, held_out = (set(documents(part.text)) for part in (corpus.train[0], corpus.validation[0]))
    assert held_out - {b"\0a new note"} == before and not train & held_out


def test_the_split_does_not_depend_on_the_process(notes):
    code = f"from revjax.data import *; c = load_corpus({config(notes)!r}); print(c.validation[0].text.starts.tolist())"
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == str(load_corpus(config(notes)).validation[0].text.starts.tolist())


@pytest.mark.parametrize("count, fraction, held", [(2, 1e-9, 1), (2, 0.999, 1), (5, 0.0, 0)])
def test_both_sides_have_a_document_where_that_is_possible(count, fraction, held):
    rows = [(2 * i + 2, i + 1, i * 2**60) for i in range(count)]
    cache = TokenCache(
        "", np.zeros(2 * count, np.uint8), np.array(rows, [("end", "i8"), ("bytes", "i8"), ("hash", "u8")])
    )
    train, held_out = split(cache, fraction)
    assert (train.num_documents, held_out.num_documents) == (count - held, held)


def test_one_document_is_split_by_position(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a" * 75 + "b" * 24)
    corpus = load_corpus(config(path))
    assert documents(corpus.train[0].text) == [b"\0" + b"a" * 74]
    assert documents(corpus.validation[0].text) == [b"a" + b"b" * 24]


def test_a_mixture_has_its_shares_and_more_texts_to_evaluate_on(notes, tmp_path):
    (tmp_path / "book.txt").write_text("abc" * 100)
    sources = {str(notes): 3, str(tmp_path / "book.txt"): 1}
    corpus = load_corpus(DataConfig(sequence_length=4, source=sources, validation={"book": str(tmp_path / "book.txt")}))
    assert [part.weight for part in corpus.train] == [0.75, 0.25]
    assert [(part.name, part.weight) for part in corpus.validation] == [
        (str(notes), 0.75),
        (str(tmp_path / "book.txt"), 0.25),
        ("book", 0.0),
    ]
    alone = load_corpus(config(notes, validation_fraction=0, validation={"book": str(tmp_path / "book.txt")}))
    assert [(part.name, part.weight) for part in alone.validation] == [("book", 1.0)]
    other_shares = load_corpus(DataConfig(sequence_length=4, source={name: 1 for name in sources}))
    assert len({corpus.fingerprint, alone.fingerprint, other_shares.fingerprint}) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("abc", "training text .* has 3 tokens, but one row needs 5"),
        ("a" * 10, "validation text .* or a larger data.validation_fraction"),
    ],
)
def test_a_split_that_is_too_short_is_named(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_corpus(config(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, but got 0"),
        ({"sequence_length": -1}, "sequence_length must be at least 1"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\)"),
        ({"validation_fraction": float("nan")}, r"validation_fraction must be in \[0, 1\)"),
        ({"source": ""}, "source must be"),
        ({"source": {}}, "source must be"),
        ({"source": {"a": 0.0}}, "the share of 'a' must be above 0"),
        ({"tokenizer": ""}, "tokenizer must not be empty"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**change)
