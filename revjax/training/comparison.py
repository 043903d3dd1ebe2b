"""Runs side by side, from what they left in their folders."""

import dataclasses
import math
import os
import pathlib
import statistics
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import RunFolderError
from .metrics import headline, read_metrics
from .plots import smooth


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run has come to. None where it has not come to it yet, nan where its latest is no number."""

    name: str
    step: int
    loss: float | None  # of training, the mean of the last fiftieth: in bits per byte of text, or nats
    held_out: float | None  # of the last evaluation, likewise
    best_held_out: float | None
    tokens_per_second: float | None  # median
    canary: int  # rows not rebuilt to the bit, over all steps
    unsafe: int  # elements that were not finite or did not fit, over all steps
    skipped: int  # updates left out
    losses: dict[int, float]  # of training, by step; those that are no number are left out
    held_out_losses: dict[int, float]  # of what is held out, likewise


def summarize_run(folder: str | os.PathLike) -> RunSummary:
    """Reads the .jsonl files of the run in `folder`."""
    folder = pathlib.Path(folder)
    steps, evaluations = (read_metrics(folder / f"{name}.jsonl") for name in ("metrics", "validation"))
    losses, held_out = _by_step(steps), _by_step(evaluations)
    recent = list(losses.values())[-max(len(losses) // 50, 1) :]
    speeds = [line["tokens_per_second"] for line in steps]
    return RunSummary(
        name=folder.name,
        step=steps[-1]["step"] if steps else 0,
        loss=_latest(steps, float(np.mean(recent)) if recent else math.nan),
        held_out=_latest(evaluations, next(reversed(held_out.values()), math.nan)),
        best_held_out=min(held_out.values(), default=None),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        canary=sum(line["canary"] for line in steps),
        unsafe=sum(line["unsafe"] for line in steps),
        skipped=steps[-1]["skipped"] if steps else 0,
        losses=losses,
        held_out_losses=held_out,
    )


def _by_step(lines: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: x for line in lines if (x := headline(line)) is not None}


def _latest(lines: list[dict[str, Any]], number: float) -> float | None:
    """`number`, unless there are no lines (None) or the last one has no number (nan)."""
    if not lines:
        return None
    return math.nan if headline(lines[-1]) is None else number


def find_runs(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The folders of runs in `folder`, by name. Raises `RunFolderError` where there are none."""
    folder = pathlib.Path(folder).expanduser()
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not found:
        raise RunFolderError(f"There is no run in {folder}: no folder there has a config.yaml. Give another folder.")
    return found


def table(summaries: list[RunSummary]) -> str:
    """A line for each run."""
    columns: dict[str, Any] = {
        "run": lambda s: s.name,
        "step": lambda s: f"{s.step:,}",
        "train": lambda s: _number(s.loss),
        "held out": lambda s: _number(s.held_out),
        "best": lambda s: _number(s.best_held_out),
        "tokens/s": lambda s: "-" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}",
        "canary": lambda s: f"{s.canary:,}",
        "unsafe": lambda s: f"{s.unsafe:,}",
        "skipped": lambda s: f"{s.skipped:,}",
    }
    rows = [list(columns)] + [[cell(s) for cell in columns.values()] for s in summaries]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    line = lambda row: "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))])
    return "\n".join([*map(line, rows), "", "train, held out, best: bits per byte of text, nats of anything else"])


def plot_runs(summaries: list[RunSummary], path: pathlib.Path) -> None:
    """Draws the losses of every run: of training, a running mean; of what is held out, dashed."""
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = [s for s in summaries if len(s.losses) > 1]
    lowest, highest = math.inf, -math.inf
    for i, summary in enumerate(drawn):
        color, style = f"C{i % 10}", ("-", ":", "-.")[i // 10 % 3]  # there are ten colours
        losses, held_out = smooth(np.array([*summary.losses.values()])), summary.held_out_losses
        axes.plot([*summary.losses], losses, style, color=color, linewidth=1.4, label=summary.name)
        axes.plot([*held_out], [*held_out.values()], "o--", color=color, markersize=3, linewidth=1)
        lowest = min([lowest, losses.min(), *held_out.values()])
        highest = max([highest, np.quantile(losses, 0.97), *list(held_out.values())[-1:]])
    if drawn:  # as in loss.png, the first steps may be above the frame
        margin = 0.05 * max(highest - lowest, 0.1)
        axes.set_ylim(lowest - margin, highest + margin)
    axes.set(xlabel="step", ylabel="bits per byte of text, or nats (dashed: held out)")
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if drawn:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"
