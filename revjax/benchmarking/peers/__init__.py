"""revjax beside the reversible libraries of PyTorch: the same stack, the same work, each in a process of its own.

    stack      pre-norm causal attention and gated MLP, 12 x (x1 += attention(x2); x2 += MLP(x1)), float32
    time       of a gradient, median of several; processes take turns, and what counts is the ratio within a turn
    bytes      that the process grows by, at its highest, while it computes one gradient (with the gradient itself)
    error      of the gradient, relative, against that of the same weights with stored activations

torch lives in an environment of its own (`REQUIREMENTS`; 6 GB, since PyPI's torch brings CUDA).
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import venv
from typing import Any

from ...errors import RevjaxError
from ...logging import get_logger

REQUIREMENTS = (
    "torch==2.14.1",
    "numpy==2.4.6",
    "reformer-pytorch==1.4.4",
    "revtorch==0.2.4",
    "revlib==1.7.2",
    "memcnn==1.5.2",
)
PEERS = ("stored", "checkpoint", "reformer-pytorch", "revtorch", "revlib", "memcnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """One library on one shape: "revjax", or one of `PEERS` ("stored" and "checkpoint" are PyTorch's own)."""

    peer: str
    num_layers: int
    d_model: int
    sequence_length: int
    batch_size: int
    repeats: int = 5
    turns: int = 3


def peer(config: PeerConfig, *, folder: pathlib.Path | None = None) -> dict[str, Any]:
    """Measures one library, in turns with revjax.

    Args:
      folder: of torch's environment; None is runs/benchmarks/peers.

    Raises `RevjaxError` where the environment cannot be made, and where a process fails.
    """
    ours = [sys.executable, "-m", f"{__package__}.jax_step"]
    theirs = ours
    if config.peer != "revjax":
        python = _environment(folder or pathlib.Path("runs/benchmarks/peers"))
        theirs = [str(python), str(pathlib.Path(__file__).parent / "torch_step.py")]
    turns = [[_run(words, config, "seconds")["seconds"] for words in (theirs, ours)] for _ in range(config.turns)]
    ratios = [a / b for a, b in turns]
    return _run(theirs, config, "bytes") | {
        "seconds": statistics.median(a for a, _ in turns),
        "to_revjax": statistics.median(ratios),
        "to_revjax_low": min(ratios),
        "to_revjax_high": max(ratios),
    }


def _environment(folder: pathlib.Path) -> pathlib.Path:
    """The Python of an environment with the peers in it; made where it is not there yet."""
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists() and ready.read_text().split("\n") == list(REQUIREMENTS):
        return python
    get_logger(__name__).info("installing %s into %s (once; some minutes)", ", ".join(REQUIREMENTS), folder)
    venv.create(folder, with_pip=True, clear=True)
    words = [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RevjaxError(f"The peers could not be installed: {' '.join(words)}\n{done.stderr[-2000:]}")
    ready.write_text("\n".join(REQUIREMENTS))
    return python


def _run(words: list[str], config: PeerConfig, what: str) -> dict[str, Any]:
    environment = dict(os.environ)
    if what == "bytes":  # every array of some size is mapped on its own, and given back as soon as it is freed
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    words = [*words, json.dumps(dataclasses.asdict(config) | {"what": what})]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RevjaxError(f"{config.peer} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
