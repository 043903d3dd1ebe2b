"""Numbers of a run, one JSON object a line: a line is complete, or it is the last one.

metrics.jsonl      one for each step                       validation.jsonl   one for each evaluation
samples.jsonl      one for each text                       trouble.jsonl      one for each gradient not trusted

A number that is not finite is written as null, because JSON has no NaN.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..errors import RunFolderError
from ..logging import get_logger
from .trackers import Tracker, curves

LOGS = ("metrics", "validation", "samples", "trouble")


class MetricsLog:
    """Appends to the four files of a run folder.

    A disk that is full or gone is told once and ends nothing: lines wait in memory until they can be written.

    Args:
      folder: an existing folder.
      start_step: lines after this step are dropped first: a resumed run writes them again.
      trackers: get what steps and evaluations give as well, and are closed with the files.
    """

    def __init__(self, folder: str | os.PathLike, *, start_step: int = 0, trackers: Sequence[Tracker] = ()):
        self.trackers = list(trackers)
        self.folder = pathlib.Path(folder)
        self._files = {name: _Lines(self.folder / f"{name}.jsonl") for name in LOGS}
        self.go_back(start_step)

    def step(self, **numbers: Any) -> None:
        """Writes a line of metrics.jsonl: what became of one training step."""
        self._files["metrics"].append(numbers)
        self._track("train", numbers)

    def validation(self, **numbers: Any) -> None:
        """Writes a line of validation.jsonl."""
        self._files["validation"].append(numbers)
        self._track("validation", numbers)

    def _track(self, kind: str, numbers: dict[str, Any]) -> None:
        for tracker in list(self.trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.write(numbers["step"], curves(kind, _plain(numbers)))

    @contextlib.contextmanager
    def _dropped_if_it_fails(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # of a library, a disk or a network: none of them may end a run
            self.trackers.remove(tracker)
            message = "%s gets no more curves: %s: %s. The .jsonl files go on."
            get_logger(__name__).error(message, type(tracker).__name__, type(e).__name__, e)

    def sample(self, **fields: Any) -> None:
        """Writes a line of samples.jsonl."""
        self._files["samples"].append(fields)

    def trouble(self, **fields: Any) -> None:
        """Writes a line of trouble.jsonl, and waits until it is on the disk."""
        self._files["trouble"].append(fields, sync=True)

    def last_step(self, name: str) -> int:
        """The step of the last line of NAME.jsonl; -1 where there is none."""
        return self._files[name].last_step

    def go_back(self, step: int) -> None:
        """Drops lines after `step`. A rewind to `step` or before it stays: what follows depends on it."""
        for file in self._files.values():
            file.keep(lambda line: line["step"] <= step or line.get("to_step", math.inf) <= step)
        for tracker in list(self.trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.go_back(step)

    def close(self, *, failed: bool = False) -> None:
        """Closes files and trackers; `failed` where training ended by an error."""
        for file in self._files.values():
            file.close()
        for tracker in list(self.trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.close(failed=failed)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close(failed=exception[0] is not None)


class _Lines:
    """A .jsonl file that only ever grows by whole lines."""

    def __init__(self, path: pathlib.Path):
        self.path, self.last_step = path, -1
        self._waiting: list[bytes] = []
        self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._file).st_size

    def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
        self.last_step = fields["step"]
        self._waiting.append(_line(_plain(fields)))
        text = b"".join(self._waiting)
        try:
            if os.write(self._file, text) < len(text):
                raise OSError(0, "it is full")
            if sync:
                os.fsync(self._file)
        except OSError as e:
            os.ftruncate(self._file, self._size)  # nothing, rather than a part of a line
            if len(self._waiting) == 1:
                get_logger(__name__).error("Cannot write %s: %s. Its lines wait in memory.", self.path, e.strerror)
        else:
            self._size += len(text)
            self._waiting.clear()

    def keep(self, wanted) -> None:
        """Drops the lines that are not `wanted`, and what is left of one that was cut off."""
        self._waiting = [line for line in self._waiting if wanted(json.loads(line))]
        lines = read_metrics(self.path)
        kept = [line for line in lines if wanted(line)]
        self.last_step = max((line["step"] for line in kept), default=-1)
        text = b"".join(map(_line, kept))
        if len(kept) < len(lines) or self.path.stat().st_size != len(text):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_bytes(text)
            os.replace(temporary, self.path)
            os.close(self._file)
            self._open()

    def close(self) -> None:
        if self._waiting:
            get_logger(__name__).error("%d lines of %s could not be written.", len(self._waiting), self.path)
        os.close(self._file)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a .jsonl file; [] where there is no file. A last line that was cut off is left out.

    Raises `RunFolderError` where a line is no JSON.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is not complete
        try:
            found += [json.loads(line)] if line else []
        except ValueError as e:
            raise RunFolderError(f"{path}:{number} is not JSON ({e}): delete that line.") from None
    return found


def rewinds_to(folder: str | os.PathLike, step: int) -> list[dict[str, Any]]:
    """The lines of trouble.jsonl that tell of going back to the checkpoint of `step`, oldest first."""
    return [line for line in read_metrics(pathlib.Path(folder) / "trouble.jsonl") if line.get("to_step") == step]


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that does not depend on how text is cut into tokens."""
    return nats_per_token / bytes_per_token / math.log(2)


def headline(line: dict[str, Any]) -> float | None:
    """The number by which a line of metrics.jsonl or validation.jsonl is shown: bits per byte of text, or the loss."""
    return line["bits_per_byte"] if "bits_per_byte" in line else line["loss"]


def unit_of(lines: Sequence[dict[str, Any]]) -> str:
    """What `headline` counts."""
    return "bits/byte" if all("bits_per_byte" in line for line in lines) else "nats"


def describe_evaluation(found: dict[str, Any], digits: int = 4) -> str:
    """What an evaluation gave, in a few words: the loss with so many digits, and of images the accuracy."""
    number = headline(found)
    shown = "no number" if number is None else f"{number:.{digits}f} {unit_of([found])}"
    right = f", accuracy {found['accuracy']:.2%}" if found.get("accuracy") is not None else ""
    return f"{shown}{right}"


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _plain(x: Any) -> Any:
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        x = np.asarray(x).item()
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x
