"""The picture of a study: losses against tokens, and what the last ones cost in kept bits and in memory."""

import math
import pathlib
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .study import Comparison


def plot(comparisons: Sequence[Comparison], path: pathlib.Path, *, title: str) -> None:
    """Writes the picture to `path`. Losses are means over seeds, in bits per byte; bars are 95 % intervals."""
    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    over_tokens, over_bits, over_memory = figure.subplots(1, 3)
    for i, comparison in enumerate(comparisons):
        curves = [row["curve"] for row in comparison.rows]
        points = [(at[0][0], statistics.fmean(x for _, x in at)) for at in zip(*curves)]
        style = ("-", "--", ":", "-.")[i // 10 % 4]  # there are ten colours
        over_tokens.plot(*zip(*points), style, linewidth=1.4, color=f"C{i % 10}", label=comparison.variant)
        error = None if math.isinf(comparison.half_width) else comparison.half_width
        for axes, name, unit in ((over_bits, "kept_bits", 1.0), (over_memory, "step_bytes", 1e6)):
            x = comparison.rows[0][name] / unit
            axes.errorbar(x, comparison.difference, error, fmt="o", markersize=5, capsize=3, color=f"C{i % 10}")
            axes.annotate(comparison.variant, (x, comparison.difference), (5, 4), textcoords="offset points", size=8)
    lowest = min(comparison.loss for comparison in comparisons)
    over_tokens.set_ylim(lowest * 0.98, lowest * 1.35)  # the beginnings are alike
    over_tokens.set(xlabel="tokens", ylabel="held-out bits per byte")
    over_tokens.legend(frameon=False, fontsize=8)
    over_bits.set(xlabel="kept bits for each element and f", ylabel="% above the baseline's loss")
    over_bits.set_xscale("symlog", base=2, linthresh=1)
    over_bits.set_xticks([0, 1, 2, 4, 8, 16, 32], ["0", "1", "2", "4", "8", "16", "32"])
    over_memory.set(xlabel="temporary bytes of a step, MB")
    for axes in (over_tokens, over_bits, over_memory):
        _tidy(axes)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _tidy(axes: Axes) -> None:
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
