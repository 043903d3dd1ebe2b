"""The numbers of metrics.jsonl and validation.jsonl, for tools that draw curves."""

import contextlib
import importlib.util
import math
import pathlib
import socket
import time
from typing import Any, Protocol

from ..errors import ConfigError
from ..logging import get_logger

_LEFT_OUT = {"step", "time", "peak_flops"}
_FLUSH_S = 5.0  # seconds after which a curve shows what was written
_FINISH_S = 60.0  # seconds to send what is left: a machine that is taken away waits no longer, and it can be sent later


class Tracker(Protocol):
    """Gets what each step and each evaluation gives. Where it cannot take more, it raises, and is asked no more."""

    def go_back(self, step: int) -> None:
        """What it was given of steps after `step` comes again."""
        ...

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Takes numbers by names such as train/loss. A step may come again, after a rewind."""
        ...

    def close(self, *, failed: bool) -> None:
        """Takes no more; `failed` where training ended by an error."""
        ...


def check_installed(config: Any) -> None:
    """Raises `ConfigError` where what `config` (`TrainingConfig`) wants curves for is not installed."""
    for wanted, name in ((config.tensorboard, "tensorboardX"), (config.wandb is not None, "wandb")):
        if wanted and importlib.util.find_spec(name) is None:
            extra = name.removesuffix("X")
            raise ConfigError(f"training.{extra} needs {name}. Type: pip install {name}")


class TensorBoard:
    """Writes event files into `folder`. What comes again hides what was there."""

    def __init__(self, folder: pathlib.Path):
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
        from tensorboardX.record_writer import RecordWriter

        # Not SummaryWriter: its thread dies of a full disk, and then it waits for that thread for ever.
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}"
        self._writer, self._event, self._summary = RecordWriter(str(folder / name)), Event, Summary
        self._start = SessionLog(status=SessionLog.START)
        self._flushed = 0.0
        self._write(0, file_version="brain.Event:2")

    def go_back(self, step: int) -> None:
        self._write(step + 1, session_log=self._start)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        values = [{"tag": name, "simple_value": x} for name, x in numbers.items()]
        self._write(step, summary=self._summary(value=values))

    def _write(self, step: int, **what: Any) -> None:
        now = time.time()
        try:
            self._writer.write(self._event(wall_time=now, step=step, **what).SerializeToString())
            if now > self._flushed + _FLUSH_S:
                self._writer.flush()
                self._flushed = now
        except OSError:
            with contextlib.suppress(OSError):
                self._writer.close()
            raise

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends to `project`, and keeps in `folder`/wandb what was not sent yet. A `run_id` goes on where it was there.

    It forgets nothing: steps that come again are there twice. `config` is what is shown beside the run. Raises
    `ConfigError` where nobody is logged in.
    """

    def __init__(self, folder: pathlib.Path, *, project: str, run_id: str, name: str, config: dict[str, Any]):
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                name=name,
                config=config,
                dir=folder,
                reinit="create_new",  # a script may have a run of its own
                settings=wandb.Settings(console="off", silent=True, finish_timeout=_FINISH_S),
            )
        except wandb.Error as e:
            raise ConfigError(
                f"training.wandb: {e} Or set WANDB_MODE=offline: what is kept in {folder}/wandb is sent later by "
                "`wandb sync`."
            ) from None
        self._run.define_metric("*", step_metric="step")  # wandb's own counter takes no step twice
        if self._run.url:
            get_logger(__name__).info("curves: %s", self._run.url)

    def go_back(self, step: int) -> None:
        pass

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def curves(kind: str, line: dict[str, Any]) -> dict[str, float]:
    """What is drawn of a line of a log: its finite numbers, by names that begin with `kind`."""
    found = {f"{kind}/{name}": x for name, x in line.items() if name not in _LEFT_OUT and _is_number(x)}
    for text, numbers in (line.get("texts") or {}).items():
        found |= {f"{kind}/{name}/{text}": x for name, x in numbers.items() if _is_number(x)}
    return found


def _is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float) and math.isfinite(x)
