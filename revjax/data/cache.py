"""Documents, tokenised once, in files that are mapped into memory.

    FOLDER/KEY/tokens.bin      every document: the separator, then its tokens            uint8, uint16 or uint32
                               (or, with tokens that begin one: these, its tokens, the separator;
                               conversations begin and end as their template says)
               trained.bin     of conversations, for each token: 1 where it is to be learned, else 0        uint8
               documents.npy   for each: where it ends, bytes of text up to there, a hash of its text
               meta.json       sizes and checksums; the last file to be written
    FOLDER/KEY.lock            held by the process that makes it: another waits for it

KEY is a hash of the contents of the files, the tokenizer and the settings. A folder of that name is whole: it is
written under another name, and renamed. What was damaged since is found by its checksums, and made again.
"""

import array
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

import filelock
import numpy as np

from ..errors import DataError
from ..logging import Progress, get_logger
from .chat import ChatTemplate, Conversations
from .documents import Documents, Piece
from .tokenizer import Tokenizer

_FORMAT = 1  # of the files; another one makes other keys
_BATCH = 4 * 2**20  # characters that are tokenised in parallel: about 300 MB of memory
_SHOWN = 5 * 10**6  # bytes of files, above which progress is shown
_DOCUMENTS = np.dtype([("end", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])  # end and bytes count from the first one


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Tokenised documents."""

    key: str
    tokens: np.ndarray  # (number of tokens,), mapped into memory
    documents: np.ndarray  # (number of documents,), of `end` (tokens), `bytes` (of text) and `hash` (of its text)
    trained: np.ndarray | None = None  # (number of tokens,), 0 or 1: which are to be learned; None: all of them


def cached_tokens(
    paths: list[pathlib.Path],
    tokenizer: Tokenizer,
    *,
    text_field: str,
    folder: str | os.PathLike,
    template: ChatTemplate | None = None,
) -> TokenCache:
    """Returns the documents of `paths`, tokenised; makes them, where `folder` does not hold them.

    With a `template` they are conversations, whose `bytes` are those of text that is to be learned. The hash of a
    document is that of its text: wherever it stands, whatever is beside it, however it is tokenised.
    Raises `DataError` for files that cannot be read, and for a folder that cannot be written to.
    """
    folder = pathlib.Path(folder).expanduser()
    key = _key(paths, tokenizer, text_field, template)
    try:
        found = _open(folder / key)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{key}.lock"):
                found = _open(folder / key, tell=True)  # another process may have made it by now
                if found is None:
                    documents = Documents(paths, text_field)
                    if template is not None:
                        documents = Conversations(paths, text_field, template)
                    _make(folder / key, documents, tokenizer)
                    found = _open(folder / key)
    except OSError as e:
        raise DataError(
            f"Cannot keep tokens in {folder}: {e.strerror or e}. Set --data.cache to a folder with room for them."
        ) from None
    if found is None:
        raise DataError(f"{folder / key} was written, but is not what was written: is that disk sound?")
    return found


def _key(paths: list[pathlib.Path], tokenizer: Tokenizer, text_field: str, template: ChatTemplate | None) -> str:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        files = list(pool.map(_hash_of_file, paths))
    kinds = ["".join(path.suffixes).lower()[-16:] for path in paths]  # how they are read
    settings = [_FORMAT, tokenizer.fingerprint, text_field, kinds, files]
    if template is not None:
        settings.append(template.fingerprint)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _hash_of_file(path: pathlib.Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"Cannot read {path}: {e.strerror}. Check its permissions, or narrow data.source.") from None


def _locked(path: pathlib.Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0).lock
    except filelock.Timeout:
        get_logger(__name__).info("another process is tokenising this text: waiting for it")
        return lock


def _open(path: pathlib.Path, *, tell: bool = False) -> TokenCache | None:
    """What was made at `path`, checked; None where there is nothing, or nothing that can be used (`tell`: and why)."""
    if not path.is_dir():
        return None
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        for name, (size, checksum) in meta["files"].items():
            if (path / name).stat().st_size != size or _checksum(path / name) != checksum:
                raise ValueError(f"{name} is not what was written")
        tokens = np.memmap(path / "tokens.bin", meta["dtype"], mode="r")
        trained = np.memmap(path / "trained.bin", np.uint8, mode="r") if "trained.bin" in meta["files"] else None
        return TokenCache(path.name, tokens, np.load(path / "documents.npy"), trained)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
        if tell:
            get_logger(__name__).warning("%s is damaged (%s): the text is tokenised again", path, e)
        return None


def _checksum(path: pathlib.Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _make(path: pathlib.Path, documents: Documents, tokenizer: Tokenizer) -> None:
    """Writes `path`, in one rename. Whoever calls this holds its lock."""
    shutil.rmtree(path, ignore_errors=True)  # damaged
    temporary = path.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    try:
        dtype = np.min_scalar_type(max(tokenizer.vocab_size - 1, 0))
        _write(temporary, documents, tokenizer, dtype)
        files = {file.name: (file.stat().st_size, _checksum(file)) for file in sorted(temporary.iterdir())}
        meta = {"dtype": dtype.name, "files": files, "tokenizer": tokenizer.fingerprint}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(folder: pathlib.Path, documents: Documents, tokenizer: Tokenizer, dtype: np.dtype) -> None:
    paths = documents.paths
    size = sum(path.stat().st_size for path in paths)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(-(-size // 10**6), "tokenise (MB)")) if size > _SHOWN else None
        open_file = lambda name: stack.enter_context((folder / name).open("wb"))
        writer = _Writer(open_file("tokens.bin"), tokenizer, dtype)
        trained = open_file("trained.bin") if isinstance(documents, Conversations) else None
        for batch in _batches(documents):
            texts = [piece.text for piece in batch]
            if trained is None:
                for piece, tokens in zip(batch, tokenizer.encode_batch(texts), strict=True):
                    writer.add(piece, tokens)
            else:
                for piece, (tokens, starts) in zip(batch, tokenizer.encode_marked_up(texts), strict=True):
                    writer.add_conversation(piece, tokens)
                    trained.write(_is_trained(piece, starts))
            if progress is not None:
                progress.update(-(-documents.bytes_read // 10**6) - progress.done)
    if not writer.rows:
        not_text = len(documents.not_text)
        left_out = f"{not_text} not UTF-8 text" if not_text else f"all are {documents.nothing}"
        raise DataError(f"No text in {paths[0]}{f' and {len(paths) - 1} more files' if paths[1:] else ''}: {left_out}.")
    documents.tell_left_out()
    np.save(folder / "documents.npy", np.frombuffer(writer.rows, _DOCUMENTS))


class _Writer:
    """Appends documents, piece by piece, to `file`; `rows` are those of documents.npy."""

    def __init__(self, file: IO[bytes], tokenizer: Tokenizer, dtype: np.dtype):
        self.file, self.dtype = file, dtype
        separator = (tokenizer.separator,)
        self.first, self.last = (tokenizer.begin, separator) if tokenizer.begin else (separator, ())
        self.rows = array.array("Q")  # a third of a row each
        self.num_tokens = self.num_bytes = 0
        self.hash = None  # of the document that was begun

    def add(self, piece: Piece, tokens: np.ndarray) -> None:
        text = piece.text.encode("utf-8")
        if self.hash is None:
            self.hash = hashlib.blake2b(digest_size=8)
            self._write(self.first)
        self.hash.update(text)
        self._write(tokens)
        self.num_bytes += len(text)
        if piece.is_last:
            self._write(self.last)
            self.rows.extend((self.num_tokens, self.num_bytes, int.from_bytes(self.hash.digest())))
            self.hash = None

    def add_conversation(self, piece: Piece, tokens: np.ndarray) -> None:
        self._write(tokens)
        self.num_bytes += sum(len(piece.text[first:last].encode("utf-8")) for first, last in piece.trained or ())
        text_hash = hashlib.blake2b(piece.text.encode("utf-8"), digest_size=8)
        self.rows.extend((self.num_tokens, self.num_bytes, int.from_bytes(text_hash.digest())))

    def _write(self, tokens: Sequence[int] | np.ndarray) -> None:
        self.file.write(np.asarray(tokens, self.dtype).tobytes())
        self.num_tokens += len(tokens)


def _is_trained(piece: Piece, starts: np.ndarray) -> bytes:
    """For each token of a conversation, by the character at which it starts. Never the first, which follows none."""
    spans = np.array(piece.trained)
    i = np.searchsorted(spans[:, 0], starts, side="right") - 1
    is_trained = (i >= 0) & (starts < spans[i, 1])
    is_trained[:1] = False
    return is_trained.astype(np.uint8).tobytes()


def _batches(documents: Documents) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in documents:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
