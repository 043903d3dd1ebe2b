"""The picture of a search for a plan: time against memory, every candidate a point."""

import os
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .planner import Found

_COLOURS = {"nothing": "#1f5a92", "attention": "#c8501e", "all": "#5b8c3a", "inputs": "#8a4fa0"}
_PARTS, _PARTS_COLOUR = "different parts", "#b99a3c"
_GREY = "#666666"


def plot_plans(found: Found, path: str | os.PathLike, *, title: str) -> pathlib.Path:
    """Draws time of a step (relative, predicted) against its memory, with the frontier and the chosen one."""
    path = pathlib.Path(path)
    fastest = min(c.time for c in found.candidates)
    unit, name = (1e9, "GB") if max(c.bytes for c in found.candidates) >= 1e9 else (1e6, "MB")
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, colour in {**_COLOURS, _PARTS: _PARTS_COLOUR}.items():
        points = [(c.bytes / unit, c.time / fastest) for c in found.candidates if _kind(c.choice.plan) == kind]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.55, linewidths=0, label=kind)
    frontier = [(c.bytes / unit, c.time / fastest) for c in found.frontier()]
    axes.plot(*zip(*frontier, strict=True), color=_GREY, linewidth=0.8, drawstyle="steps-pre", zorder=0)
    if found.chosen is not None:
        at = (found.chosen.bytes / unit, found.chosen.time / fastest)
        axes.scatter(*at, s=90, facecolors="none", edgecolors="black", linewidths=1.2, label="chosen")
    axes.axvline(found.budget / unit, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set(xlabel=f"memory of a device, {name}", ylabel="time of a step, relative (estimate)", title=title)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _kind(plan: str) -> str:
    return _PARTS if "," in plan else plan.partition(":")[0]
