"""Numbers of a run, one JSON object a line: a line is complete, or it is the last one.

`metrics.jsonl` has one line for each step, `validation.jsonl` one for each evaluation. A number that is
not finite is written as null, because JSON has no NaN.
"""

import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np


class MetricsLog:
    """Appends to the two files of a run folder.

    Args:
      folder: an existing folder.
      start_step: lines after this step are dropped first: a resumed run writes them again.
    """

    def __init__(self, folder: str | os.PathLike, *, start_step: int = 0):
        folder = pathlib.Path(folder)
        self._files = {}
        for name in ("metrics", "validation"):
            path = folder / f"{name}.jsonl"
            _keep_up_to(path, start_step)
            self._files[name] = open(path, "a", encoding="utf-8")

    def step(self, **numbers: Any) -> None:
        """Writes a line of metrics.jsonl: what became of one training step."""
        self._write("metrics", numbers)

    def validation(self, **numbers: Any) -> None:
        """Writes a line of validation.jsonl."""
        self._write("validation", numbers)

    def _write(self, name: str, numbers: dict[str, Any]) -> None:
        self._files[name].write(json.dumps({k: _plain(v) for k, v in numbers.items()}) + "\n")
        self._files[name].flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a .jsonl file; [] where there is no file. A last line that was cut off is left out."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # what follows the last line break is not complete


def bits(nats: float) -> float:
    """Nats in bits."""
    return nats / math.log(2)


def _keep_up_to(path: pathlib.Path, step: int) -> None:
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= step]
    if not path.exists() or (len(kept) == len(lines) and path.read_bytes().endswith(b"\n")):
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _plain(x: Any) -> Any:
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        x = np.asarray(x).item()
    return None if isinstance(x, float) and not math.isfinite(x) else x
