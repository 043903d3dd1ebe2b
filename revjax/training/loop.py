"""The training loop.

The device never waits for the host: metrics of a step are read while the next one runs. So whatever must not
happen after a bad step is prevented inside the jitted step (see `step`), and only told here.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import numpy as np

from ..checkpoint import Checkpointer
from ..data import Batches
from ..logging import Progress, get_logger
from .metrics import MetricsLog, bits
from .signals import StopRequest
from .state import Skeleton, TrainState
from .step import OnTrouble

_SHOWN = 5  # complaints that are written out in full


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, and what to do on the way. Steps count updates."""

    steps: int = 1000
    tokens: int | None = None  # instead of steps: how many to train on
    seed: int = 0  # of parameters, batches and dropout
    eval_every: int = 100  # steps between two looks at the held-out text
    eval_batches: int = 8  # batches of such a look, always the same ones
    checkpoint_every: int = 200  # steps; the last step is always saved
    keep_checkpoints: int = 2  # the latest ones stay on disk
    on_trouble: OnTrouble = "skip"  # a wrong or broken gradient: warn and use it, skip it, or stop before it
    spike_sigmas: float | None = None  # a loss so many deviations above recent ones is trouble; null: none is
    z_loss: float = 0.0  # of the squared log-sum-exp of the logits, added to the training loss; 1e-4 is usual
    ema_decay: float | None = None  # of a running mean of the parameters, which then is what is evaluated; null: none
    log_every_s: float = 10.0  # seconds between two lines of progress, where there is no terminal
    sample_prompt: str = "def "  # what the sample at the end continues; "" writes none
    sample_tokens: int = 300
    sample_temperature: float = 0.7

    def __post_init__(self):
        for name in ("steps", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, or null for training.steps, but got {self.tokens}.")
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            raise ValueError(f"spike_sigmas must be above 0, or null, but got {self.spike_sigmas}.")
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss must be at least 0, but got {self.z_loss}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, such as 0.999, or null, but got {self.ema_decay}.")
        if self.sample_temperature < 0:
            raise ValueError(f"sample_temperature must be at least 0 (greedy), but got {self.sample_temperature}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, but got {self.seed}.")
        if self.on_trouble == "rewind":
            raise ValueError(
                "on_trouble 'rewind' comes with the training system, which is not part of this version. Use 'skip' "
                "(leave the update out and go on) or 'stop' (leave it out, save a checkpoint and end)."
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended."""

    state: TrainState
    ended: Literal["finished", "interrupted", "stopped"]
    signal: int | None = None  # which one interrupted it


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    batches: Batches,
    *,
    config: TrainingConfig,
    skeleton: Skeleton,
    evaluate: Callable[[TrainState], float] | None,
    checkpointer: Checkpointer,
    metrics_log: MetricsLog,
    stop_request: StopRequest,
) -> Outcome:
    """Trains until step `config.steps`, a signal, or (with on_trouble "stop") a gradient that is not to be trusted.

    Args:
      state: as of the last step that was made; it is used up.
      train_step: compiled, from `make_train_step`.
      batches: where they stand is saved with each checkpoint; they must stand at `state.step`.
      evaluate: returns the held-out loss in nats per token; None leaves validation out.

    Every ending leaves a committed checkpoint of the state that is returned.
    """
    step, validated = int(state.step), -1
    assert batches.step == step, f"batches stand at {batches.step}, the state at {step}"
    with Progress(config.steps, "train", every_s=config.log_every_s) as progress:
        progress.update(step)
        reader = _Reader(config, skeleton, metrics_log, progress, batches.batch_size * batches.sequence_length)

        def validate():
            nonlocal validated
            if evaluate is not None and validated != step:
                reader.read()
                validated, loss = step, evaluate(state)
                metrics_log.validation(step=step, loss=loss, bits_per_byte=bits(loss), time=round(time.time(), 3))
                get_logger(__name__).info("step %d: validation %.4f bits/byte", step, bits(loss))
                reader.restart_clock()

        if step == 0:
            validate()
        while step < config.steps and not (reader.must_stop or stop_request.signal):
            state, metrics = train_step(state, next(batches))  # returns at once: the device works on
            step += 1
            reader.read()  # the step before this one
            reader.pending = (step, metrics)
            if step % config.eval_every == 0 or step == config.steps:
                validate()
            if checkpointer.should_save(step):
                reader.read()
                checkpointer.save(step, state.as_dict(), {"step": step, "data": batches.state()})
                reader.restart_clock()
        reader.read()
    checkpointer.save(step, state.as_dict(), {"step": step, "data": batches.state()}, force=True)
    checkpointer.wait()
    if reader.must_stop:
        return Outcome(state, "stopped")
    return Outcome(state, "finished") if step >= config.steps else Outcome(state, "interrupted", stop_request.signal)


class _Reader:
    """Fetches the metrics of a step once the next one is under way; writes, shows and judges them."""

    def __init__(
        self, config: TrainingConfig, skeleton: Skeleton, log: MetricsLog, progress: Progress, tokens_per_step: int
    ):
        self.config, self.skeleton, self.log, self.progress = config, skeleton, log, progress
        self.tokens_per_step = tokens_per_step
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.complaints = 0
        self.must_stop = False
        self.restart_clock()

    def restart_clock(self) -> None:
        """What has passed since the last step was not training."""
        self.since = time.perf_counter()

    def read(self) -> None:
        """Waits for the pending step, if there is one, and reads it."""
        if self.pending is None:
            return
        (step, on_device), self.pending = self.pending, None
        numbers = jax.device_get({name: x for name, x in on_device.items() if name != "report"})
        now = time.perf_counter()
        speed, self.since = self.tokens_per_step / max(now - self.since, 1e-9), now
        trouble, loss = bool(numbers.pop("trouble")), float(numbers["loss"])
        numbers |= {name: int(numbers[name]) for name in ("canary", "unsafe", "skipped")}
        numbers |= {"bits_per_byte": bits(loss), "tokens_per_second": round(speed, 1), "time": round(time.time(), 3)}
        self.log.step(step=step, **numbers)
        self.progress.update(
            1, loss=loss, bits_per_byte=bits(loss), tokens_per_s=round(speed), canary=numbers["canary"]
        )
        if trouble:
            self._complain(step, numbers, on_device["report"])
            self.must_stop = self.config.on_trouble == "stop"

    def _complain(self, step: int, metrics: dict[str, Any], report: Any) -> None:
        self.complaints += 1
        done = {
            "warn": "The update was made all the same (training.on_trouble: warn).",
            "skip": "The update was left out (training.on_trouble: skip).",
            "stop": "The update was left out, and training ends (training.on_trouble: stop).",
        }[self.config.on_trouble]
        if self.complaints > _SHOWN and self.config.on_trouble != "stop":
            get_logger(__name__).warning("step %d: trouble again (%d times so far). %s", step, self.complaints, done)
            return
        said = report.describe(self.skeleton.abstract)
        finite = np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
        if not finite:
            said += f"\nThe loss is {metrics['loss']:.4g} and the norm of its gradient {metrics['grad_norm']:.4g}."
        get_logger(__name__).warning(
            "step %d: this step's gradient is not to be trusted.\n%s\n%s", step, said.strip(), done
        )


def mean_loss(eval_step: Callable[[Any, Any], tuple[Any, Any]], params: Any, batches: Iterable[Any]) -> float:
    """The loss in nats per token over all of `batches`: the sums are divided once."""
    sums = [eval_step(params, batch) for batch in batches]
    total, weight = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
    return float(total / weight)
