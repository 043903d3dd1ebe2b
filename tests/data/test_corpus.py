"""Local text becomes the same tokens everywhere, with whole files held out, or a clear error."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from revjax.data import DataConfig, load_corpus
from revjax.data.corpus import END_OF_FILE, _held_out
from revjax.errors import DataError


def config(source, **changes):
    return DataConfig(**{"source": str(source), "sequence_length": 4, "validation_fraction": 0.25, **changes})


@pytest.fixture
def notes(tmp_path):
    """Twenty files of 40 bytes in three folders."""
    folder = tmp_path / "notes"
    for i in range(20):
        path = folder / "abc"[i % 3] / f"{i:02d}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{i:02d}".ljust(39) + "\n")
    return folder


def test_a_folder_is_every_file_in_order_of_name_each_followed_by_its_end(notes):
    corpus = load_corpus(config(notes, validation_fraction=0))
    assert corpus.train.dtype == np.uint8 and len(corpus.validation) == 0
    paths = sorted(notes.rglob("*.md"))
    assert corpus.train.tobytes() == b"".join(p.read_bytes() + bytes([END_OF_FILE]) for p in paths)
    assert corpus.train_files == tuple(p.relative_to(notes).as_posix() for p in paths)


def test_whole_files_are_held_out(notes):
    corpus = load_corpus(config(notes))
    assert corpus.validation_files and not set(corpus.train_files) & set(corpus.validation_files)
    assert len(corpus.train_files) + len(corpus.validation_files) == 20
    assert corpus.validation.tobytes() == b"".join((notes / n).read_bytes() + b"\0" for n in corpus.validation_files)


def test_a_new_file_moves_no_other_file(notes):
    before = load_corpus(config(notes))
    (notes / "new.md").write_text("a new note")
    after = load_corpus(config(notes))
    assert set(before.validation_files) == set(after.validation_files) - {"new.md"}


def test_the_split_does_not_depend_on_the_process(notes):
    code = f"from revjax.data import *; print(load_corpus({config(notes)!r}).validation_files)"
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == str(load_corpus(config(notes)).validation_files)


@pytest.mark.parametrize("count, fraction, held", [(2, 1e-9, 1), (2, 0.999, 1), (1, 0.5, 0), (5, 0.0, 0)])
def test_both_sides_have_a_file_where_that_is_possible(count, fraction, held):
    assert len(_held_out([f"{i}.md" for i in range(count)], fraction)) == held


def test_one_file_is_split_by_position(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a" * 75 + "b" * 25)
    corpus = load_corpus(config(path))
    assert corpus.train.tobytes() == b"a" * 75 + b"\0" and corpus.validation.tobytes() == b"b" * 25 + b"\0"


def test_a_glob_selects(notes, monkeypatch):
    assert all(n.startswith("a/") for n in load_corpus(config(notes / "a*" / "**" / "*.md")).train_files)
    monkeypatch.chdir(notes.parent)
    assert len(load_corpus(config("notes/**/*.md", validation_fraction=0)).train_files) == 20


def test_hidden_files_are_left_out(notes):
    (notes / ".git").mkdir()
    (notes / ".git" / "config").write_text("[core]")
    assert ".git/config" not in load_corpus(config(notes, validation_fraction=0)).train_files


def test_files_that_are_not_text_are_left_out_with_a_warning(notes, caplog):
    (notes / "image.png").write_bytes(b"\x89PNG\xff")
    corpus = load_corpus(config(notes, validation_fraction=0))
    assert "image.png" not in corpus.train_files
    assert "left out 1 files that are not UTF-8" in caplog.text and "image.png" in caplog.text


def test_the_standard_library_is_millions_of_tokens_of_source():
    corpus = load_corpus(DataConfig())
    files = set(corpus.train_files + corpus.validation_files)
    assert {"argparse.py", "asyncio/events.py"} <= files
    assert not [f for f in files if {"test", "tests", "site-packages"} & set(pathlib.PurePath(f).parts)]
    assert len(corpus.train) > 5_000_000 and len(corpus.validation) > 200_000
    assert 0.02 < len(corpus.validation_files) / len(files) < 0.1


def empty_file(folder):
    (folder / "a.txt").write_text("")
    return "a.txt"


def short_file(folder):
    (folder / "a.txt").write_text("abc")
    return "a.txt"


def binary_file(folder):
    (folder / "a.bin").write_bytes(b"\xff\xfe\xff")
    return "a.bin"


def empty_folder(folder):
    (folder / "nothing").mkdir()
    return "nothing"


def short_validation(folder):
    (folder / "a.txt").write_text("a" * 10)
    return "a.txt"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: "nowhere", "no file or folder.*nowhere.*seen from"),
        (lambda folder: "*.txt", r"No text for data.source .*\*.txt.*no file is there"),
        (empty_folder, "No text for data.source.*no file is there"),
        (empty_file, "all 1 files are empty"),
        (binary_file, "1 files there are not UTF-8 text"),
        (short_file, "training text .* has 3 tokens, but one row needs 5"),
        (short_validation, "validation text .* or a larger data.validation_fraction"),
    ],
)
def test_bad_sources_are_named(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        load_corpus(config(tmp_path / make(tmp_path)))


def test_a_file_that_may_not_be_read_is_named(notes, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)  # root may read anything, so chmod would not do
    with pytest.raises(DataError, match=r"Cannot read .*00.md: Permission denied"):
        load_corpus(config(notes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, but got 0"),
        ({"sequence_length": -1}, "sequence_length must be at least 1"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\)"),
        ({"validation_fraction": float("nan")}, r"validation_fraction must be in \[0, 1\)"),
        ({"source": ""}, "source must be"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**change)
