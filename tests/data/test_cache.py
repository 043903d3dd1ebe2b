"""A text is tokenised once; what is damaged is made again; two processes make it once; nothing half made is left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from revjax.data import ByteTokenizer, FileTokenizer, train_tokenizer
from revjax.data import documents as documents_module
from revjax.data.cache import cached_tokens
from revjax.errors import DataError


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(["first", "über", "third"]):
        (folder / f"{i}.txt").write_text(text)
    return sorted(folder.iterdir())


def make(paths, tmp_path, tokenizer=None):
    return cached_tokens(paths, tokenizer or ByteTokenizer(), text_field="text", folder=tmp_path / "cache")


def test_documents_follow_one_another_each_after_a_separator(paths, tmp_path):
    cache = make(paths, tmp_path)
    assert cache.tokens.dtype == np.uint8 and cache.tokens.tobytes() == "\0first\0über\0third".encode()
    assert cache.documents["end"].tolist() == [6, 12, 18] and cache.documents["bytes"].tolist() == [5, 10, 15]
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {cache.key, f"{cache.key}.lock"}


def test_a_second_start_reads_what_the_first_made(paths, tmp_path, monkeypatch):
    first = make(paths, tmp_path)
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)  # it cannot be made again
    again = make(paths, tmp_path)
    assert again.key == first.key and (again.tokens == first.tokens).all()
    assert (again.documents == first.documents).all()


def test_tokens_are_the_same_in_pieces_and_the_type_holds_the_vocabulary(paths, tmp_path, monkeypatch):
    (tmp_path / "t.json").write_text(train_tokenizer(str(tmp_path / "text"), 257))
    tokenizer = FileTokenizer(tmp_path / "t.json")
    whole = make(paths, tmp_path, tokenizer)
    assert whole.tokens.dtype == np.uint16
    monkeypatch.setattr(documents_module, "PIECE", 2)
    pieces = cached_tokens(paths, tokenizer, text_field="text", folder=tmp_path / "other")
    assert (pieces.tokens == whole.tokens).all() and (pieces.documents == whole.documents).all()


def test_the_key_changes_with_contents_tokenizer_and_field(paths, tmp_path):
    (tmp_path / "t.json").write_text(train_tokenizer(str(tmp_path / "text"), 257))
    keys = {make(paths, tmp_path).key, make(paths, tmp_path, FileTokenizer(tmp_path / "t.json")).key}
    keys.add(cached_tokens(paths, ByteTokenizer(), text_field="body", folder=tmp_path / "cache").key)
    keys.add(make(paths[:-1], tmp_path).key)
    paths[0].write_text("First")
    assert len(keys | {make(paths, tmp_path).key}) == 5


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "meta.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_a_damaged_cache_is_made_again_and_said_so(paths, tmp_path, caplog, name, how):
    before = make(paths, tmp_path)
    tokens, file = before.tokens.tobytes(), tmp_path / "cache" / before.key / name
    contents = file.read_bytes()
    del before
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes(contents[:-1] if how == "truncated" else contents[:-9] + b"\xff" + contents[-8:])
    assert make(paths, tmp_path).tokens.tobytes() == tokens
    if name != "meta.json" or how != "truncated":  # without its last line break it says the same
        assert "is damaged" in caplog.text and "tokenised again" in caplog.text
        assert file.read_bytes() == contents


def test_what_fails_leaves_nothing_behind(paths, tmp_path):
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="bad.jsonl:1 is not JSON"):
        make([*paths, tmp_path / "bad.jsonl"], tmp_path)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_folder_that_cannot_hold_it_is_named(paths, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="Cannot keep tokens in .*cache: .*Set --data.cache"):
        make(paths, tmp_path)


@pytest.mark.parametrize("text, message", [("", "all are documents without text"), ("a\0", "1 not UTF-8 text")])
def test_files_without_any_text_are_an_error(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        make([tmp_path / "a.txt"], tmp_path)


def _make_and_count(paths, tmp_path, made):
    encode = ByteTokenizer.encode_batch

    def counting(self, texts):
        with made.get_lock():
            made.value += 1
        time.sleep(0.5)
        return encode(self, texts)

    ByteTokenizer.encode_batch = counting
    assert make(paths, tmp_path).tokens.tobytes() == "\0first\0über\0third".encode()


def test_two_processes_make_it_once(paths, tmp_path):
    context = multiprocessing.get_context("spawn")
    made = context.Value("i", 0)
    processes = [context.Process(target=_make_and_count, args=(paths, tmp_path, made)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert made.value == 1


def test_what_a_killed_process_left_is_no_cache(paths, tmp_path):
    code = f"""
import os, signal
from revjax.data import ByteTokenizer
from revjax.data.cache import cached_tokens
import pathlib
ByteTokenizer.encode_batch = lambda self, texts: os.kill(os.getpid(), signal.SIGKILL)
cached_tokens(sorted(pathlib.Path({str(tmp_path / "text")!r}).iterdir()), ByteTokenizer(), text_field="text",
              folder={str(tmp_path / "cache")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    assert any(p.suffix == ".tmp" for p in (tmp_path / "cache").iterdir())
    cache = make(paths, tmp_path)
    assert len(cache.tokens) == 18 and not any(p.suffix == ".tmp" for p in (tmp_path / "cache").iterdir())
