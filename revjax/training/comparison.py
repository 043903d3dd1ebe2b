"""Runs side by side, from what they left in their folders."""

import dataclasses
import os
import pathlib
import statistics
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import RunFolderError
from .metrics import read_metrics
from .plots import smooth


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run has come to. None where it has not come to it yet."""

    name: str
    step: int
    bits_per_byte: float | None  # of training, the mean of the last fiftieth
    held_out: float | None  # bits per byte of the last evaluation
    best_held_out: float | None
    tokens_per_second: float | None  # median
    canary: int  # rows not rebuilt to the bit, over all steps
    skipped: int  # updates left out
    losses: list[float]  # of training, bits per byte, each step


def summarize_run(folder: str | os.PathLike) -> RunSummary:
    """Reads the .jsonl files of the run in `folder`."""
    folder = pathlib.Path(folder)
    steps, evaluations = (read_metrics(folder / f"{name}.jsonl") for name in ("metrics", "validation"))
    finite = lambda lines, name: [line[name] for line in lines if line.get(name) is not None]
    losses, held_out = finite(steps, "bits_per_byte"), finite(evaluations, "bits_per_byte")
    return RunSummary(
        name=folder.name,
        step=steps[-1]["step"] if steps else 0,
        bits_per_byte=float(np.mean(losses[-max(len(losses) // 50, 1) :])) if losses else None,
        held_out=held_out[-1] if held_out else None,
        best_held_out=min(held_out, default=None),
        tokens_per_second=statistics.median(finite(steps, "tokens_per_second")) if steps else None,
        canary=sum(line["canary"] for line in steps),
        skipped=steps[-1]["skipped"] if steps else 0,
        losses=losses,
    )


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
        "train": lambda s: _number(s.bits_per_byte),
        "held out": lambda s: _number(s.held_out),
        "best": lambda s: _number(s.best_held_out),
        "tokens/s": lambda s: "-" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}",
        "canary": lambda s: f"{s.canary}",
        "skipped": lambda s: f"{s.skipped}",
    }
    rows = [list(columns)] + [[cell(s) for cell in columns.values()] for s in summaries]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    line = lambda row: "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))])
    return "\n".join([*map(line, rows), "", "train, held out, best: bits per byte"])


def plot_runs(summaries: list[RunSummary], path: pathlib.Path) -> None:
    """Draws the running mean of the training loss of every run, in bits per byte."""
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = {s.name: smooth(np.array(s.losses)) for s in summaries if len(s.losses) > 1}
    for i, (name, losses) in enumerate(curves.items()):
        style = ("-", "--", ":", "-.")[i // 10 % 4]  # there are ten colours
        axes.plot(np.arange(1, len(losses) + 1), losses, style, linewidth=1.4, label=name)
    if curves:  # as in loss.png, the first steps may be above the frame
        lowest = min(losses.min() for losses in curves.values())
        highest = max(np.quantile(losses, 0.97) for losses in curves.values())
        margin = 0.05 * max(highest - lowest, 0.1)
        axes.set_ylim(lowest - margin, highest + margin)
    axes.set(xlabel="step", ylabel="training loss in bits per byte, running mean")
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if curves:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"
