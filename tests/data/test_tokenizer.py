"""Text comes back from its tokens, whole or bit by bit, whatever the tokenizer."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from revjax.data import ByteTokenizer, DataConfig, FileTokenizer, load_tokenizer, train_tokenizer
from revjax.data.cache import cached_tokens
from revjax.errors import DataError

texts = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("".join(f"the number {i} is not the number {i + 1}\n" for i in range(500)))
    (folder / "tokenizer.json").write_text(train_tokenizer(str(folder / "text.txt"), 300))
    return FileTokenizer(folder / "tokenizer.json")


@given(texts)
def test_text_comes_back_from_bytes(text):
    tokens = ByteTokenizer().encode(text)
    assert tokens.dtype == np.int32 and ByteTokenizer().decode(tokens) == text


@given(text=texts)
def test_text_comes_back_from_a_trained_tokenizer(trained, text):
    tokens = trained.encode(text)
    assert trained.decode(tokens) == text and (tokens < trained.vocab_size).all() and trained.separator not in tokens


@pytest.mark.parametrize("which", ["bytes", "trained"])
def test_text_comes_back_bit_by_bit(trained, which):
    tokenizer = ByteTokenizer() if which == "bytes" else trained
    text = "the number é 日本 is not 🎉 the end"
    decode = tokenizer.stream(tokenizer.encode("the prompt ").tolist())
    pieces = [decode([token], False) for token in tokenizer.encode(text)] + [decode([], True)]
    assert "".join(pieces) == text and len([p for p in pieces if p]) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_cut_off_is_shown_as_one(trained):
    for tokenizer in (ByteTokenizer(), trained):
        tokens = tokenizer.encode("a🎉").tolist()[:-1]
        assert tokenizer.stream()(tokens, True).startswith("a\ufffd")


def test_a_trained_tokenizer_has_the_size_that_was_asked_for_and_shortens_its_text(trained):
    assert trained.vocab_size == 300 and trained.separator == 299
    assert len(trained.encode("the number 17 is not the number 18")) < 20


def test_text_that_spells_a_special_token_is_text(trained):
    assert trained.separator not in trained.encode("a <|endoftext|> b")
    assert trained.decode(trained.encode("a <|endoftext|> b")) == "a <|endoftext|> b"


def test_truncation_and_padding_of_the_file_are_not_used(trained, tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(trained.file)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    (tmp_path / "t.json").write_text(tokenizer.to_str())
    one, other = FileTokenizer(tmp_path / "t.json").encode_batch(["the number is the number 123456", "a"])
    assert len(one) > 4 and len(other) == 1


def test_another_separator_is_another_tokenizer(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(trained.file)
    other = load_tokenizer(DataConfig(tokenizer=str(tmp_path), separator="!"))
    assert other.separator == trained.encode("!")[0] and other.fingerprint != trained.fingerprint


@pytest.mark.parametrize(
    "contents, separator, message",
    [
        (None, None, r"Cannot read the tokenizer .*t.json \(data.tokenizer\): No such file"),
        ("{}", None, "is not a tokenizer.json"),
        (
            "trained",
            "<nothing>",
            r"has no token '<nothing>'\. Set --data.separator to one that it has: <\|endoftext\|>\.",
        ),
        (
            "bare",
            None,
            r"usual tokens between documents \(<\|.*\. Set --data.separator to one that it has: <\|other\|>\.",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(trained, tmp_path, contents, separator, message):
    if contents is not None:
        contents = trained.file.decode() if contents in ("trained", "bare") else contents
        contents = contents.replace("<|endoftext|>", "<|other|>") if separator is None else contents
        (tmp_path / "t.json").write_text(contents)
    with pytest.raises(DataError, match=message):
        FileTokenizer(tmp_path / "t.json", separator)


def test_sizes_that_cannot_be_trained_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(str(tmp_path / "a.txt"), 256)
    with pytest.raises(DataError, match="gives only .* tokens, not 5000"):
        train_tokenizer(str(tmp_path / "a.txt"), 5000)


def with_begin(trained, path):
    """The same tokenizer with a post-processor, as Llama 2 and Gemma have one."""
    tokenizer = tokenizers.Tokenizer.from_buffer(trained.file)
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])  # pyright: ignore
    tokenizer.save(str(path))
    return FileTokenizer(path), begin


def test_a_tokenizer_may_begin_documents_with_a_token_of_its_own(trained, tmp_path):
    tokenizer, begin = with_begin(trained, tmp_path / "tokenizer.json")
    assert tokenizer.begin == (begin,) and trained.begin == () and ByteTokenizer().begin == ()
    assert tokenizer.fingerprint != trained.fingerprint
    assert tokenizer.encode("a b").tolist() == trained.encode("a b").tolist()
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name)
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    cache = cached_tokens(paths, tokenizer, text_field="text", folder=tmp_path / "cache")
    one, two = ([begin, *tokenizer.encode(name), tokenizer.separator] for name in ("one", "two"))
    assert cache.tokens.tolist() == one + two and cache.documents["end"].tolist() == [len(one), len(one) + len(two)]
    assert cache.documents["bytes"].tolist() == [3, 6]


def test_what_stands_after_a_text_begins_none(trained, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_buffer(trained.file)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", trained.separator)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert FileTokenizer(tmp_path / "tokenizer.json").begin == ()
