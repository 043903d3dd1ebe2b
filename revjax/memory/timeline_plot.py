"""The picture of a `Timeline`."""

import os
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .timeline import CATEGORIES, GRADIENTS, OTHER, Timeline

_COLOURS = dict(
    zip(
        [*CATEGORIES, GRADIENTS, OTHER],
        "#1f5a92 #c8501e #8a4fa0 #5b8c3a #d9a441 #7fa8cf #7a5c48 #4a4a4a #c8c8c8".split(),
        strict=True,
    )
)
_GREY = "#666666"


def plot_timeline(timeline: Timeline, path: str | os.PathLike, *, title: str) -> pathlib.Path:
    """Draws the bytes alive at each instruction, by what they are for; returns the path."""
    path = pathlib.Path(path)
    each = [timeline.by_category(at) for at in range(timeline.length)]
    shown = [name for name in _COLOURS if max((sums[name] for sums in each), default=0) > 0.005 * timeline.temp_bytes]
    mega = np.array([[sums[name] / 1e6 for sums in each] for name in shown])

    figure = Figure(figsize=(9, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stackplot(
        np.arange(timeline.length), mega, labels=shown, colors=[_COLOURS[name] for name in shown], step="post"
    )
    top = timeline.temp_bytes / 1e6
    axes.axhline(top, color=_GREY, linewidth=0.8, linestyle="--")
    axes.annotate(f"reserved by XLA: {top:,.4g} MB", (0, top), (4, 4), textcoords="offset points", color=_GREY, size=8)
    for loop in timeline.loops:
        if loop.end - loop.start > 0.02 * timeline.length:
            axes.plot([loop.start, loop.end], [1.22 * top] * 2, color=_GREY, linewidth=3, solid_capstyle="butt")
            middle = (loop.start + loop.end) / 2
            axes.annotate(
                f"loop: {loop.name}",
                (middle, 1.22 * top),
                (0, -5),
                textcoords="offset points",
                ha="center",
                va="top",
                size=8,
                color=_GREY,
            )
    axes.set_xlim(0, max(timeline.length - 1, 1))
    axes.set_ylim(0, 1.25 * top)
    axes.set_xlabel("instruction, in the order in which XLA runs them (what is in a loop stands here once)")
    axes.set_ylabel("temporary memory, MB")
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    return path
