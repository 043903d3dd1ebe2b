"""The picture of a study: which variant is how far from the baseline, its losses on the way, and what it costs."""

import math
import pathlib
import statistics
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..training import unit_of
from .study import Comparison

_FEW = 10  # variants that can have a colour each
_BITS = [0, 1, 2, 4, 8, 16, 32]


def plot(comparisons: Sequence[Comparison], path: pathlib.Path, *, title: str) -> None:
    """Writes the picture to `path`, variants from the best to the worst.

    Losses are means over seeds, in bits per byte of text, or nats; bars are 95 % intervals.
    """
    ranked = sorted(comparisons, key=lambda c: c.loss)
    figure = Figure(figsize=(16, max(4.4, 1.2 + 0.21 * len(ranked))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    by_name, over_tokens, over_bits, over_memory = figure.subplots(1, 4, width_ratios=[1.3, 1.1, 1, 1])
    for i, comparison in enumerate(ranked):
        colour = _colour(comparison, i, len(ranked))
        error = None if math.isinf(comparison.half_width) else comparison.half_width
        dot = dict(fmt="o", markersize=5, capsize=3, color=colour)
        by_name.errorbar(comparison.difference, i, xerr=error, **dot)
        points = [(at[0][0], statistics.fmean(x for _, x in at)) for at in zip(*(r["curve"] for r in comparison.rows))]
        over_tokens.plot(*zip(*points), linewidth=1.3, color=colour)
        over_bits.errorbar(_bits(comparison), comparison.difference, error, **dot)
        over_memory.errorbar(comparison.rows[0]["step_bytes"] / 1e6, comparison.difference, error, **dot)
    by_name.set_yticks(range(len(ranked)), [c.variant for c in ranked], fontsize=9)
    by_name.invert_yaxis()
    by_name.axvline(0, color="#999999", linewidth=0.8)
    coloured = "" if len(ranked) <= _FEW else "; coloured by kept bits"
    by_name.set(xlabel=f"% above the baseline's loss{coloured}")
    over_tokens.set_ylim(ranked[0].loss * 0.98, ranked[0].loss * 1.35)  # the beginnings are alike
    over_tokens.set(xlabel="tokens", ylabel=f"held-out {unit_of([row for c in ranked for row in c.rows])}")
    over_tokens.ticklabel_format(axis="x", style="sci", scilimits=(6, 6), useMathText=True)
    over_bits.set(xlabel="kept bits for each element and f", ylabel="% above the baseline's loss")
    over_bits.set_xscale("symlog", base=2, linthresh=1)
    over_bits.set_xticks(_BITS, [str(n) for n in _BITS])
    over_memory.xaxis.set_major_locator(MaxNLocator(4))
    over_memory.set(xlabel="temporary bytes of a step, MB", ylabel="% above the baseline's loss")
    for axes in (by_name, over_tokens, over_bits, over_memory):
        _tidy(axes)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colour(comparison: Comparison, i: int, number: int):
    """One for each variant where there are few, else one for each number of kept bits."""
    if number <= _FEW:
        return f"C{i}"
    at_most = next((j for j, bits in enumerate(_BITS) if _bits(comparison) <= bits), len(_BITS) - 1)
    return colormaps["viridis"](at_most / len(_BITS))


def _bits(comparison: Comparison) -> float:
    return comparison.rows[0]["kept_bits"]


def _tidy(axes: Axes) -> None:
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
