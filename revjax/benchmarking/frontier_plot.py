"""Memory and time of plans and rivals as a picture: a panel for each shape; nearer to the lower left is better."""

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

_SHAPE = ("num_layers", "d_model", "sequence_length", "batch_size", "dtype")
_MARKERS = "osDv^<>P*X"


def plot_frontier(rows: Sequence[dict[str, Any]], path: pathlib.Path, *, title: str) -> None:
    """Writes the picture of the suites "rivals" and "accelerator" to `path`. A line joins the ways that no other beats
    in both memory and time; what did not fit is left out, and shapes of which one way did. Time is that over plan
    "nothing" where ways were timed in pairs with it.
    """
    panels: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["seconds"] is not None:
            panels.setdefault(tuple(row.get(name, "") for name in _SHAPE), []).append(row)
    panels = {shape: panels[shape] for shape in sorted(panels) if len(panels[shape]) > 1}
    if not panels:
        return
    paired = all("to_nothing" in row for row in rows)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure = Figure(figsize=(4.6 * len(panels) + 2, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (shape, found) in zip(axes, panels.items(), strict=True):
        best = sorted((r for r in found if not any(_beats(other, r) for other in found)), key=lambda r: r["bytes"])
        axis.plot([r["bytes"] / 1e9 for r in best], [_time(r) for r in best], color="#55aa55", linewidth=1)
        for row in found:
            colour = "tab:blue" if row["way"].startswith("revjax ") else "tab:gray"
            marker = dict(marker=_MARKERS[ways.index(row["way"]) % len(_MARKERS)], markersize=8, linestyle="none")
            axis.plot(row["bytes"] / 1e9, _time(row), color=colour, alpha=0.85, label=row["way"], **marker)
            if "to_nothing" in row:
                low, high = row["to_nothing_low"], row["to_nothing_high"]
                axis.plot([row["bytes"] / 1e9] * 2, [low, high], color=colour, alpha=0.4, linewidth=1.5)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        layers, width, length, batch, dtype = shape
        words = [f"{layers} layers", f"width {width}" if width else "", f"{batch} x {length:,} tokens", dtype]
        axis.set_title(", ".join(filter(None, words)), fontsize=10)
        axis.set_xlabel("GB, with gradients" if paired else "GB, with parameters and gradients")
        axis.margins(0.1)
    axes[0].set_ylabel("time of a step beside plan nothing, in pairs" if paired else "seconds of a step")
    marks = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    marks = {way: marks[way] for way in ways if way in marks}
    figure.legend(marks.values(), marks.keys(), loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _time(row: dict[str, Any]) -> float:
    return row.get("to_nothing", row["seconds"])


def _beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether `a` takes no more memory and no more time than `b`, and less of one."""
    mine, others = (a["bytes"], _time(a)), (b["bytes"], _time(b))
    return mine != others and mine[0] <= others[0] and mine[1] <= others[1]
