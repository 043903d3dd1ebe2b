"""The picture of `OpTimes`."""

import os
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .op_times import ELSEWHERE, OpTimes

_COLOURS = {"forward": "#7fa8cf", "backward": "#1f5a92", "loss": "#5b8c3a", ELSEWHERE: "#c8c8c8"}
_GREY = "#666666"


def plot_op_times(times: OpTimes, path: str | os.PathLike, *, title: str) -> pathlib.Path:
    """Draws the time of a step by what it is for, and by loop; returns the path."""
    path = pathlib.Path(path)
    sums = sorted(times.by_category().items(), key=lambda item: sum(item[1].values()))
    figure = Figure(figsize=(7.5, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = [0.0] * len(sums)
    for loop, colour in _COLOURS.items():
        widths = [1e3 * by_loop.get(loop, 0.0) for _, by_loop in sums]
        if any(widths):
            axes.barh([name for name, _ in sums], widths, left=left, color=colour, label=loop, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("milliseconds of a step")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path)
    return path
