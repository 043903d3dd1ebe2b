"""The curve of a run, from its two .jsonl files."""

import os
import pathlib
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .metrics import headline, read_metrics, unit_of

_LIGHT, _DARK, _HELD_OUT, _GREY = "#b9cfe4", "#1f5a92", "#c8501e", "#666666"


def plot_losses(folder: str | os.PathLike, *, title: str) -> pathlib.Path | None:
    """Draws the losses of the run in `folder` into its loss.png; returns the path, or None before the first step.

    In bits per byte, or nats of what is not text: every training step (light), their running mean (dark), and what is
    held out (points).
    """
    folder = pathlib.Path(folder)
    lines, held_out = read_metrics(folder / "metrics.jsonl"), _numbers(read_metrics(folder / "validation.jsonl"))
    unit, numbers = unit_of(lines), _numbers(lines)
    if not numbers:
        return None
    steps, losses = np.array([*numbers]), np.array([*numbers.values()])

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=_LIGHT, linewidth=0.8, label="training, each step")
    if len(losses) >= 20:
        axes.plot(steps, smooth(losses), color=_DARK, linewidth=1.6, label="training, running mean")
    if held_out:
        x, y = [*held_out], [*held_out.values()]
        axes.plot(x, y, "o-", color=_HELD_OUT, markersize=4, linewidth=1, label="held out")
        last = axes.annotate(
            f"{y[-1]:.3f}", (1.01 * steps[-1], y[-1]), (3, 0), "data", "offset points", va="center", color=_HELD_OUT
        )
        last.set_annotation_clip(False)  # it stands beside the axes
    lowest = min([*losses, *held_out.values()])
    # The first steps are far above all that follows: leave them out of the frame rather than flatten the rest.
    highest = max(np.quantile(losses, 0.97), losses[-1]) if len(losses) >= 20 else max(losses)
    highest = max([highest, *list(held_out.values())[-1:]])
    margin = 0.08 * max(highest - lowest, 0.1)
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlim(0, 1.01 * steps[-1])  # the last point stands inside
    axes.set(xlabel="step", ylabel=f"loss in {unit}")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.legend(frameon=False, fontsize=9)
    path = folder / "loss.png"
    figure.savefig(path)
    return path


def _numbers(lines: list[dict[str, Any]]) -> dict[int, float]:
    """What lines are shown by, by step, where it is a number."""
    return {line["step"]: x for line in lines if (x := headline(line)) is not None}


def smooth(losses: np.ndarray) -> np.ndarray:
    """The mean of the losses around each step (a fiftieth of all of them); fewer at both ends."""
    half = max(len(losses) // 100, 2)
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    at = np.arange(len(losses))
    start, stop = np.maximum(at - half, 0), np.minimum(at + half + 1, len(losses))
    return (sums[stop] - sums[start]) / (stop - start)
