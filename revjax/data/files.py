"""The files of a source, and the text in a file.

What a file holds is told by its name (see `documents`); .gz, .bz2, .xz and .zst (which needs zstandard) at its end
are unpacked.
"""

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import pathlib
import sysconfig
import zlib
from typing import IO, Any

from ..errors import DataError
from .config import STDLIB

try:
    import zstandard
except ImportError:
    zstandard = None

# What the libraries raise for a compressed file that is cut off or changed (bz2: OSErrors without a number).
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, *((zstandard.ZstdError,) if zstandard else ()))
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def find_files(source: str) -> list[pathlib.Path]:
    """Returns the files of a source, sorted by name: a file, a folder, a glob, or python-stdlib.

    Hidden files and folders of a folder are left out. Raises `DataError` where there is nothing.
    """
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        return [p for p in _files(root, "*.py") if not _NOT_STDLIB & set(p.relative_to(root).parts)]
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        files = _saved_dataset(path)
        if files is None:
            files = [p for p in _files(path, "*") if not any(part[0] == "." for part in p.relative_to(path).parts)]
    elif path.exists():
        return [path]
    elif glob.has_magic(source):
        files = sorted(p for match in glob.glob(str(path), recursive=True) if (p := pathlib.Path(match)).is_file())
    else:
        raise DataError(
            f"There is no file or folder {source!r} (data.source), seen from {os.getcwd()}. "
            f"Give a path or a glob, or {STDLIB!r} for the Python standard library."
        )
    if not files:
        raise DataError(f"No text for data.source {source!r}: no file is there.")
    return files


def _files(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    return sorted(p for p in folder.rglob(pattern) if p.is_file())


def _saved_dataset(folder: pathlib.Path) -> list[pathlib.Path] | None:
    """The files of what `datasets.Dataset.save_to_disk` wrote, in its order; None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        choice = f"Choose one: --data.source={folder / splits[0]}"
        raise DataError(f"{folder} holds the splits {', '.join(splits)} of a dataset. {choice}")
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / file["filename"] for file in state["_data_files"]]


def kind(path: pathlib.Path) -> str:
    """The suffix in lower case, without that of a compression: ".jsonl" of "a.jsonl.gz"."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def unpacked(path: pathlib.Path, file: IO[bytes]) -> io.TextIOWrapper:
    """The text of `file`, which was opened at `path`, with its line ends as they are."""
    suffix, raw = path.suffix.lower(), file
    if suffix == ".gz":
        raw = gzip.GzipFile(fileobj=file)
    elif suffix == ".bz2":
        raw = bz2.BZ2File(file)
    elif suffix == ".xz":
        raw = lzma.LZMAFile(file)
    elif suffix == ".zst":
        if zstandard is None:
            raise DataError(f"{path}: .zst needs zstandard. Type: pip install zstandard")
        raw: Any = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return io.TextIOWrapper(raw, encoding="utf-8", newline="")  # pyright: ignore[reportArgumentType]
