"""Files of every kind give their documents; what is not text is left out, and what is damaged is named."""

import bz2
import gzip
import json
import lzma

import pytest

from revjax.data import documents as documents_module
from revjax.data.documents import Documents
from revjax.data.files import find_files
from revjax.errors import DataError

TEXTS = ["the first", "über\nzwei Zeilen\r\n", "third"]
ROWS = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))


def read(*paths, text_field="text"):
    """The documents of `paths`, put together from their pieces."""
    found, held = [], ""
    documents = Documents([path for source in paths for path in find_files(str(source))], text_field)
    for piece in documents:
        held += piece.text
        if piece.is_last:
            found.append(held)
            held = ""
    documents.tell_left_out()
    assert not held
    return found


def zst(data):
    return pytest.importorskip("zstandard").compress(data)


@pytest.mark.parametrize(
    "suffix, pack",
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zst)],
)
def test_lines_and_texts_are_read_packed_or_not(tmp_path, suffix, pack):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(ROWS.encode()))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(TEXTS[1].encode()))
    assert read(tmp_path) == [*TEXTS, TEXTS[1]]


def test_parquet_and_datasets_are_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": range(4), "text": [*TEXTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == TEXTS
    saved = tmp_path / "saved"
    saved.mkdir()
    with pyarrow.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (saved / "dataset_info.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    assert read(saved) == TEXTS
    both = tmp_path / "both"
    both.mkdir()
    (both / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match="holds the splits train, test of a dataset. Choose one: .*/train"):
        read(both)


def test_what_the_datasets_library_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS, "id": [0, 1, 2]}).select([2, 0]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [TEXTS[2], TEXTS[0]]


def test_a_long_document_comes_in_pieces_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE", 10)
    text = "".join(f"line {i}\n" for i in range(20)) + "x" * 45
    (tmp_path / "a.txt").write_text(text)
    pieces = list(Documents([tmp_path / "a.txt"], "text"))
    assert len(pieces) > 5 and "".join(piece.text for piece in pieces) == text
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n") for piece in pieces[:5]) and max(len(piece.text) for piece in pieces) <= 20


def test_what_is_not_text_is_left_out_and_counted(tmp_path, caplog):
    caplog.set_level("INFO", "revjax")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "b.bin").write_bytes(b"a\0b")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "e.jsonl").write_text('{"text": "\\ud800"}\n\n{"text": null}\n{"text": "row"}\n')
    assert read(tmp_path) == ["text", "row"]
    assert "left out 3 files or rows that are not UTF-8 text, such as " in caplog.text and "a.png" in caplog.text
    assert "left out 2 documents without text" in caplog.text


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"content": "a"}\n', r"a.jsonl:1 has no field 'text' .* Set --data.text_field=content"),
        ("a.jsonl", b'{"Texts": "a"}\n', r"has no field 'text' .* Did you mean 'Texts'"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: the field 'text' must be a text, but is 3"),
        ("a.jsonl", b'["a"]\n', r"a.jsonl:1 must be an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], r"a.txt.gz is damaged"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz is damaged"),
        ("a.txt.bz2", bz2.compress(b"text" * 1000)[:-9], r"a.txt.bz2 is damaged"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-9], r"a.txt.xz is damaged"),
        ("a.txt.zst", b"no zstandard", r"a.txt.zst (is damaged|needs zstandard)|.zst needs zstandard"),
        ("a.parquet", b"no parquet", r"a.parquet is damaged|need pyarrow"),
        ("a.arrow", b"no arrow at all", r"a.arrow is damaged|need pyarrow"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_columns_that_do_not_hold_text_are_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column 'text' must hold text, but holds int64"):
        read(tmp_path)
    with pytest.raises(DataError, match="has no field 'content'.*text, body"):
        read(tmp_path, text_field="content")


def test_a_glob_selects_and_hidden_files_are_left_out(tmp_path, monkeypatch):
    for name in ("a/1.md", "a/2.txt", "b/3.md", ".git/4.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/1.md", "a/2.txt", "b/3.md"]
    monkeypatch.chdir(tmp_path)
    assert read("**/*.md") == ["a/1.md", "b/3.md"] == read("*/*.md")


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere", "no file or folder.*nowhere.*seen from"),
        ("*.txt", r"No text for data.source .*\*.txt.*no file is there"),
        ("folder", "No text for data.source.*no file is there"),
    ],
)
def test_a_source_that_is_not_there_is_named(tmp_path, source, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        find_files(str(tmp_path / source))


def test_the_standard_library_is_source_without_its_tests():
    names = {path.as_posix() for path in find_files("python-stdlib")}
    assert any(name.endswith("/asyncio/events.py") for name in names)
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in names)
