"""Log lines and progress that read well in a terminal, in a file, and to a machine.

In a terminal: colours, and a live bar. Elsewhere: plain lines, with progress every ten seconds or ten
percent. With `format="json"`: one JSON object a line, in which progress fields are numbers.

Logs go to stderr; stdout belongs to a command's result. Nothing happens on import, and only the
"revjax" logger is touched.
"""

import collections
import datetime
import json
import logging
import numbers
import sys
import time
from typing import Any, Literal, TextIO

import rich.console
import rich.logging
import rich.progress

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def get_logger(name: str = "") -> logging.Logger:
    """Returns the logger `revjax`, or `revjax.name`; pass `__name__`, or a short name."""
    name = name.removeprefix("revjax").lstrip(".")
    return logging.getLogger(f"revjax.{name}" if name else "revjax")


def setup(level: str = "info", format: Literal["text", "json"] = "text", stream: TextIO | None = None) -> None:
    """Sends the log to `stream` (default stderr); called again, it replaces what an earlier call did.

    Args:
      level: "debug", "info", "warning" or "error"; messages below it are dropped.
      format: "text" for people, "json" for one JSON object a line.

    >>> setup("info"); get_logger().info("compiled in %.1f s", 3.2)
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"level must be 'debug', 'info', 'warning' or 'error', but got {level!r}.")
    if format not in ("text", "json"):
        raise ValueError(f"format must be 'text' or 'json', but got {format!r}.")
    console = rich.console.Console(file=stream or sys.stderr)
    if format == "text" and console.is_terminal:
        handler = rich.logging.RichHandler(console=console, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(JsonFormatter() if format == "json" else _TEXT)
    logger = get_logger()
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False  # the program that uses revjax may have handlers of its own


_TEXT = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {k: v for k, v in vars(record).items() if k not in _STANDARD and k not in entry}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=_to_json)


def _to_json(x: Any) -> Any:
    return x.item() if getattr(x, "ndim", None) == 0 else str(x)


_RECENT = 50  # updates, by whose speed the time that is left is told


class Progress:
    """Progress of `total` units of work: a live bar in a terminal, else a log line now and then.

    A line is written after the first update, then whenever `every_s` seconds or a tenth of the work have
    passed (but not within a second), and at the end. It says how long the rest will take, at the speed of the last
    updates.

    >>> with Progress(1000, "train") as progress:
    ...     progress.update(1, loss=2.31, tokens_per_s=41_000)
    """

    def __init__(self, total: int, description: str, *, every_s: float = 10.0, clock=time.monotonic):
        self.total, self.description = total, description
        self._every_s, self._clock = every_s, clock
        self.done = 0
        self._written, self._written_at = None, clock()  # units and time of the last line
        self._recent = collections.deque([], _RECENT)  # of the last updates: when, and units done by then
        self._fields: dict[str, Any] = {}
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)

    def __enter__(self):
        console = next((h.console for h in get_logger().handlers if isinstance(h, rich.logging.RichHandler)), None)
        if console is not None:  # the log's own console, so that log lines appear above the bar
            columns = (
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[shown]}"),
                rich.progress.TimeRemainingColumn(),
            )
            self._bar = rich.progress.Progress(*columns, console=console)
            self._task = self._bar.add_task(self.description, total=self.total, shown="")
            self._bar.start()
        return self

    def __exit__(self, *exception):
        if self._bar is not None:
            self._bar.stop()
        elif self._written != self.done and self.done:
            self._write()

    def update(self, n: int = 1, **fields: Any) -> None:
        """Counts `n` more units as done, and shows `fields` (loss=..., tokens_per_s=...) beside them."""
        self.done += n
        self._fields |= fields
        if n:
            self._recent.append((self._clock(), self.done))
        if self._bar is not None:
            self._bar.update(self._task, advance=n, shown=_shown(self._fields))
        elif (
            self._written is None
            or self.done >= self.total
            or (self.done - self._written >= self.total / 10 and self._clock() - self._written_at >= 1)
            or self._clock() - self._written_at >= self._every_s
        ):
            self._write()

    def _write(self):
        self._written, self._written_at = self.done, self._clock()
        left = self._seconds_left()
        fields = {"done": self.done, "total": self.total, **self._fields} | ({} if left is None else {"left_s": left})
        extra = {f"{k}_" if k in _STANDARD else k: v for k, v in fields.items()}
        line = f"{self.description} {self.done}/{self.total} {_shown(self._fields)}".rstrip()
        line += "" if left is None else f"  {datetime.timedelta(seconds=left)} left"
        get_logger("progress").info("%s", line, extra=extra)

    def _seconds_left(self) -> int | None:
        """Of the rest; None before there is a speed, and at the end."""
        (began_at, began), (now, done) = (self._recent[0], self._recent[-1]) if self._recent else ((0.0, 0), (0.0, 0))
        if done <= began or self.done >= self.total:
            return None
        return round((now - began_at) / (done - began) * (self.total - self.done))


def _shown(fields: dict[str, Any]) -> str:
    """ "loss 2.3100  tokens/s 41,000": `_per_` is a slash, and a number has as many decimals in each line."""
    return "  ".join(f"{name.replace('_per_', '/').replace('_', ' ')} {_number(x)}" for name, x in fields.items())


def _number(x: Any) -> str:
    if isinstance(x, numbers.Integral):
        return f"{x:,d}"
    try:
        x = float(x)
    except (TypeError, ValueError):
        return str(x)
    return f"{x:,.0f}" if abs(x) >= 1e4 else f"{x:.3e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}"
