"""The numbers of metrics.jsonl and validation.jsonl, for TensorBoard."""

import math
import pathlib
from typing import Any

from ..errors import ConfigError

_LEFT_OUT = {"step", "time", "peak_flops"}


class TensorBoard:
    """Writes event files into `folder`. What is there of steps after `start_step` is hidden: they come again.

    Raises `ConfigError` where tensorboardX is not installed.
    """

    def __init__(self, folder: pathlib.Path, *, start_step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "training.tensorboard needs tensorboardX. Type: pip install 'revjax[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def write(self, kind: str, numbers: dict[str, Any]) -> None:
        """Draws `numbers`, which have a step, under the heading `kind`; what is no finite number is left out."""
        for name, x in numbers.items():
            if name not in _LEFT_OUT and isinstance(x, bool | int | float) and math.isfinite(x):
                self._writer.add_scalar(f"{kind}/{name}", x, numbers["step"])
        for text, found in (numbers.get("texts") or {}).items():
            for name, x in found.items():
                self._writer.add_scalar(f"{kind}/{name}/{text}", x, numbers["step"])

    def close(self) -> None:
        self._writer.close()
