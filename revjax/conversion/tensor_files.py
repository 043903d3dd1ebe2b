"""Safetensors files, read and written one tensor at a time.

Files come from strangers: names in an index stay inside the folder, headers are checked by the safetensors library
(sizes, overlaps, truncation) and here (names that come twice), and pickle is never opened.
"""

import collections
import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, Any] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class TensorFiles:
    """The tensors of a checkpoint, in one file or several; each is read when it is asked for.

    Args:
      folder: has model.safetensors, or model.safetensors.index.json and the files that it names; or is such a file.

    Raises `CheckpointError` where there is none, and where one is not what it should be.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.metadata: dict[str, str] = {}
        self._at: dict[str, tuple[pathlib.Path, str, tuple[int, ...], int]] = {}
        for path, expected in self._files().items():
            found = self._read_header(path)
            if twice := sorted(found.keys() & self._at.keys()):
                raise CheckpointError(f"{path.name} and another file of {folder} both have {some(twice)}.")
            if expected is not None and expected != found.keys():
                missing, more = sorted(expected - found.keys()), sorted(found.keys() - expected)
                what = f"{path.name} has not {some(missing)}" if missing else f"{path.name} has {some(more)} as well"
                raise CheckpointError(f"{folder / INDEX} does not fit its files: {what}.")
            self._at |= found

    def __iter__(self):
        return iter(self._at)

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def shape(self, name: str) -> tuple[int, ...]:
        return self._at[name][2]

    def dtype(self, name: str) -> str:
        """As safetensors calls it: "BF16"."""
        return self._at[name][1]

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The tensor, or what it has at one index of its first axis."""
        path, dtype, shape, start = self._at[name]
        size = DTYPES[dtype].itemsize
        if index is not None:
            shape = shape[1:]
            start += index * math.prod(shape) * size
        with path.open("rb") as file:
            file.seek(start)
            return np.fromfile(file, DTYPES[dtype], math.prod(shape)).reshape(shape)

    def _files(self) -> dict[pathlib.Path, set[str] | None]:
        """The files, and the names that an index says they have."""
        if self.folder.is_file():
            return {self.folder: None}
        if (self.folder / WEIGHTS).exists():
            return {self._inside(WEIGHTS): None}
        if not (self.folder / INDEX).exists():
            raise CheckpointError(f"{self.folder} has no {WEIGHTS} and no {INDEX}.{self._of_pickles()}")
        index = _read_json(self._inside(INDEX))
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map of names to files.")
        files: dict[pathlib.Path, set[str] | None] = {}
        for name, file in names.items():
            found = files.setdefault(self._inside(file), set())
            assert found is not None
            found.add(name)
        return files

    def _inside(self, name: str) -> pathlib.Path:
        """The file of that name; raises `CheckpointError` where it lies elsewhere."""
        path = self.folder / name
        roots = [self.folder.resolve()]
        if self.folder.resolve().parent.name == "snapshots":  # the cache of huggingface_hub links to its blobs
            roots.append(self.folder.resolve().parents[1] / "blobs")
        if pathlib.PurePath(name).name != name or not any(path.resolve().is_relative_to(root) for root in roots):
            raise CheckpointError(f"{name!r} points out of {self.folder}: only files inside it are read.")
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has no file {name!r}, which its {INDEX} names.")
        return path

    def _of_pickles(self) -> str:
        found = sorted(p.name for pattern in _PICKLES for p in self.folder.glob(pattern))
        if not found:
            return ""
        return (
            f" It has {some(found)}: pickle may run any code, and is not opened. With transformers, in a place that "
            "you trust: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )

    def _read_header(self, path: pathlib.Path) -> dict[str, tuple[pathlib.Path, str, tuple[int, ...], int]]:
        try:
            with safe_open(path, "np"):  # checks the header against the file
                pass
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size), object_pairs_hook=_without_twins)
        except (SafetensorError, OSError, ValueError, struct.error) as e:
            raise CheckpointError(f"{path} is not a whole safetensors file: {e}.") from None
        self.metadata |= header.pop("__metadata__", {})
        return {
            name: (path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for name, entry in header.items()
        }


class TensorWriter:
    """A safetensors file of known shapes, filled in any order: tensors, or what they have at one index of an axis.

    Used in a `with`: at its end, every tensor must have been written.

    Args:
      shapes: by name, the shape and dtype of each.
      metadata: strings to keep with them.
    """

    def __init__(
        self,
        path: pathlib.Path,
        shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        metadata: Mapping[str, str] | None = None,
    ):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (shape, dtype) in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._shapes, self._missing = dict(shapes), end
        self._start = {n: 8 + len(text) + header[n]["data_offsets"][0] for n in shapes}
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, x: np.ndarray, index: int | None = None) -> None:
        """Writes a tensor, or what it has at one index of its first axis, in its dtype."""
        shape, dtype = self._shapes[name]
        part = shape if index is None else shape[1:]
        assert x.shape == part, (name, x.shape, part)
        data = np.ascontiguousarray(x, dtype).reshape(-1).view(np.uint8)
        self._file.seek(self._start[name] + (index or 0) * data.nbytes)
        self._file.write(data.data)
        self._missing -= data.nbytes

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with self._file:
            if kind is None:
                assert self._missing == 0, f"{self._missing} bytes were not written"
                self._file.flush()
                os.fsync(self._file.fileno())


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_twins)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON: {e}.") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's objects may name a thing twice, of which the first would be lost."""
    twice = [name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"{some(twice)} comes twice")
    return dict(pairs)


def some(names: list[str]) -> str:
    """The first few of many names, in words."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
