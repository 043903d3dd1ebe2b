"""The numbers of metrics.jsonl and validation.jsonl, for tools that draw curves."""

import math
import pathlib
from typing import Any, Protocol

from ..errors import ConfigError

_LEFT_OUT = {"step", "time", "peak_flops"}


class Tracker(Protocol):
    """Gets what each step and each evaluation gives."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Takes numbers by names such as train/loss. A step may come again, after a rewind."""
        ...

    def close(self) -> None: ...


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

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, x in numbers.items():
            self._writer.add_scalar(name, x, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends to `project`, and keeps in `folder`/wandb what was not sent yet. A `run_id` goes on where it was there.

    `config` is what is shown beside the run. Raises `ConfigError` where wandb is not installed or nobody is logged in.
    """

    def __init__(self, folder: pathlib.Path, *, project: str, run_id: str, name: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ConfigError("training.wandb needs wandb. Type: pip install 'revjax[wandb]'") from None
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                name=name,
                config=config,
                dir=folder,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as e:
            raise ConfigError(
                f"training.wandb: {e} Or set WANDB_MODE=offline: what is kept in {folder}/wandb is sent later by "
                "`wandb sync`."
            ) from None
        self._run.define_metric("*", step_metric="step")  # wandb's own counter takes no step twice

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


def curves(kind: str, line: dict[str, Any]) -> dict[str, float]:
    """What is drawn of a line of a log: its finite numbers, by names that begin with `kind`."""
    found = {f"{kind}/{name}": x for name, x in line.items() if name not in _LEFT_OUT and _is_number(x)}
    for text, numbers in (line.get("texts") or {}).items():
        found |= {f"{kind}/{name}/{text}": x for name, x in numbers.items() if _is_number(x)}
    return found


def _is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float) and math.isfinite(x)
