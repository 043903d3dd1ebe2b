"""How far a converted model is from the pretrained one, as a picture."""

import os
import pathlib

from matplotlib.figure import Figure

from .fidelity import Fidelity

_NAMES = {
    "source": "here beside\ntransformers",
    "rounding": "integer\nstreams",
    "coupling": "reversible",
    "dtype": "compute\ndtype",
}


def plot_fidelity(found: Fidelity, path: str | os.PathLike, *, title: str) -> pathlib.Path:
    """Draws the divergence that each step adds, and the largest |x| before each f; returns the path."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for name in _NAMES if name in found.distances]
    floor = 1e-12  # of a logarithmic axis: what is less is no difference
    left.bar([_NAMES[name] for name in names], [max(found.distances[name].kl, floor) for name in names], width=0.6)
    left.set_yscale("log")
    left.set_ylim(floor, max(1.0, *(2 * d.kl for d in found.distances.values())))
    left.set_ylabel("KL divergence, nats a token")
    for i, name in enumerate(names):
        label = f"top-1 {found.distances[name].top1:.1%}"
        left.annotate(
            label, (i, max(found.distances[name].kl, floor)), xytext=(0, 3), textcoords="offset points", ha="center"
        )
    right.plot(range(len(found.largest_x)), found.largest_x)
    right.set_ylim(bottom=0)
    right.set_xlabel("f")
    right.set_ylabel("largest |x| of the streams before it")
    figure.suptitle(title)
    path = pathlib.Path(path)
    figure.savefig(path, dpi=120)
    return path
