"""What the training loop adds to the jitted step that it calls.

The two take turns in one process: the loop trains `steps` steps, and where it would evaluate, the bare step is called
as often on batches that are there already, with one wait at the end. Evaluations and checkpoints are not counted.
"""

import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from ..checkpoint import Checkpointer
from ..data import DataConfig
from ..experiment import Experiment, MemoryConfig, RunConfig, build
from ..experiment.config import FolderConfig
from ..models import DecoderConfig
from ..training import MetricsLog, StopRequest, TrainingConfig, read_metrics, train
from .speed import interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """One shape to time."""

    num_layers: int
    d_model: int
    sequence_length: int
    batch_size: int
    steps: int = 50  # in a row, in each half of a pair
    pairs: int = 9

    def run(self, folder: str) -> RunConfig:
        return RunConfig(
            run=FolderConfig(folder=folder, name="loop"),
            model=DecoderConfig(
                num_layers=self.num_layers, d_model=self.d_model, num_heads=max(1, self.d_model // 32), window=128
            ),
            data=DataConfig(sequence_length=self.sequence_length, batch_size=self.batch_size),
            memory=MemoryConfig(plan="nothing"),
            training=TrainingConfig(
                steps=self.steps * self.pairs, eval_every=self.steps, checkpoint_every=10**9, sample_prompt=""
            ),
        )


def loop(shape: LoopConfig, *, seed: int = 0) -> dict[str, Any]:
    """Times one shape: the median of loop / bare with its 95 % interval, and the share of time that waits for data."""
    with tempfile.TemporaryDirectory() as folder:
        bare, in_loop, waits = _times(shape, build(shape.run(folder)), pathlib.Path(folder))
    ratios = in_loop / bare
    low, high = interval(ratios, seed)
    seconds = {"loop_s": float(np.median(in_loop)) / shape.steps, "bare_s": float(np.median(bare)) / shape.steps}
    found = {"to_bare": float(np.median(ratios)), "to_bare_low": low, "to_bare_high": high}
    return dataclasses.asdict(shape) | seconds | found | {"data_wait": waits / float(np.sum(in_loop))}


def _times(shape: LoopConfig, ready: Experiment, folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, float]:
    """(seconds of the bare half of each pair, of the loop's half, seconds in which the loop waited for data)."""
    copy = jax.tree.map(lambda x: x.copy(), ready.state)
    batches = [ready.batches.batch(step) for step in range(shape.steps)]
    bare = []

    def run_bare(_) -> dict[str, float]:
        nonlocal copy
        start = time.perf_counter()
        for batch in batches:
            copy, metrics = ready.train_step(copy, batch)
        jax.block_until_ready(metrics)
        bare.append(time.perf_counter() - start)
        return {"loss": 0.0, "bits_per_byte": 0.0}

    checkpoints = Checkpointer(folder / "checkpoints", every=ready.config.training.checkpoint_every)
    with checkpoints as checkpointer, MetricsLog(folder) as log, StopRequest() as request:
        outcome = train(
            ready.state,
            ready.train_step,
            ready.batches,
            config=ready.config.training,
            skeleton=ready.skeleton,
            checkpointer=checkpointer,
            metrics_log=log,
            stop_request=request,
            evaluate=run_bare,
        )
    if outcome.ended != "finished":
        raise KeyboardInterrupt
    lines = read_metrics(folder / "metrics.jsonl")
    tokens = shape.batch_size * shape.sequence_length
    seconds = np.array([tokens / line["tokens_per_second"] for line in lines]).reshape(shape.pairs, shape.steps).sum(1)
    return np.array(bare[1:]), seconds, sum(line["data_wait_s"] for line in lines)
