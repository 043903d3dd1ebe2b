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
from ..data import RowBatches
from ..errors import CheckpointError
from ..logging import Progress, get_logger
from .host_memory import HostMemory
from .metrics import MetricsLog, describe_evaluation, rewinds_to
from .reader import Pending, Reader, Trouble, Work
from .signals import StopRequest
from .state import Skeleton, TrainState
from .step import OnTrouble
from .watchdog import Watchdog

MOST_SKIPPED = 100  # one after another: then training ends
MOST_REWINDS = 3  # to one checkpoint: then training ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, and what to do on the way. Steps count updates."""

    steps: int = 1000
    tokens: int | None = None  # instead of steps: how many to train on
    epochs: float | None = None  # instead of steps: how often to see the whole text
    start_from: str | None = None  # folder of a run whose parameters this one begins with; null: random ones
    seed: int = 0  # of parameters, batches and dropout
    eval_every: int = 100  # steps between two looks at the held-out text
    eval_batches: int = 8  # batches of such a look, always the same ones
    checkpoint_every: int = 200  # steps; the last step is always saved
    keep_latest: int = 2  # so many of the latest checkpoints stay on disk
    keep_every: int | None = None  # checkpoints at multiples of this stay as well
    keep_best: int = 0  # so many checkpoints with the lowest held-out loss stay as well
    on_save_error: Literal["continue", "stop"] = "continue"  # where a checkpoint cannot be written (a full disk)
    on_trouble: OnTrouble = "skip"  # a gradient not to be trusted: warn and use it, skip it, rewind, or stop before it
    spike_sigmas: float | None = None  # a loss so many deviations above recent ones is trouble; null: none is
    z_loss: float = 0.0  # of the squared log-sum-exp of the logits, added to the training loss; 1e-4 is usual
    ema_decay: float | None = None  # of a running mean of the parameters, which then is what is evaluated; null: none
    log_every_s: float = 10.0  # seconds between two lines of progress, without a terminal; each tenth has one too
    stall_after_s: float = (
        300.0  # seconds without a step, a batch or a save, after which a warning says what is awaited
    )
    peak_flops: float | None = None  # a second, of one device, for mfu; null is the maker's figure, where it is known
    tensorboard: bool = False  # write curves to tensorboard/ in the run's folder, besides the .jsonl files
    wandb: str | None = None  # project of Weights & Biases that gets the curves as well; null: none
    sample_every: int | None = None  # steps between two samples on the way; null: only at the end
    sample_prompt: str = "def "  # what the sample at the end continues; "" writes none
    sample_tokens: int = 300
    sample_temperature: float = 0.7

    def __post_init__(self):
        for name in ("steps", "eval_every", "eval_batches", "checkpoint_every", "keep_latest", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs must be above 0, or null for training.steps, but got {self.epochs}.")
        if self.epochs is not None and self.tokens is not None:
            raise ValueError("tokens and epochs both say how long to train: set one of them.")
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
        for name in ("keep_every", "sample_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or null, but got {getattr(self, name)}.")
        if self.keep_best < 0:
            raise ValueError(f"keep_best must be at least 0, but got {self.keep_best}.")
        for name in ("log_every_s", "stall_after_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, but got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended."""

    state: TrainState
    ended: Literal["finished", "interrupted", "stopped"]
    signal: int | None = None  # which one interrupted it


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    batches: RowBatches,
    *,
    config: TrainingConfig,
    skeleton: Skeleton,
    checkpointer: Checkpointer,
    metrics_log: MetricsLog,
    stop_request: StopRequest,
    evaluate: Callable[[TrainState], dict[str, Any] | None] | None = None,
    sample: Callable[[TrainState], str] | None = None,
    meta: dict[str, Any] | None = None,
    work: Work | None = None,
) -> Outcome:
    """Trains until step `config.steps`, a signal, or (with on_trouble "stop") a gradient that is not to be trusted.

    With on_trouble "skip", a hundred of these in a row end it too.

    Args:
      state: as of the last step that was made; it is used up.
      train_step: compiled, from `make_train_step`.
      batches: where they stand is saved with each checkpoint.
      evaluate: returns what the held-out part gives (`loss`, in nats per token, `bits_per_byte`, and maybe more), or
        None if it was interrupted; None leaves validation out.
      sample: returns a text, for `config.sample_every`.
      meta: what each checkpoint holds besides, as JSON has it (versions, configuration).
      work: what a step does, for its speed; None counts the tokens of a batch.

    Every ending leaves a committed checkpoint of the state that is returned; where that cannot be written, raises
    `CheckpointError`. With on_trouble "rewind" a gradient that is not to be trusted sends training back to the last
    checkpoint, from where it goes on with the batches after the one that was met.
    """
    training = _Training(state, train_step, batches, config, checkpointer, metrics_log, stop_request)
    training.evaluate, training.sample, training.meta = evaluate, sample, meta or {}
    work = Work(batches.batch_size * batches.sequence_length) if work is None else work
    with Progress(config.steps, "train", every_s=config.log_every_s) as progress, training.watchdog:
        progress.update(training.step)
        training.reader = Reader(config.on_trouble, skeleton, metrics_log, progress, work)
        return training.run()


class _Training:
    """`train`, with what changes on the way: the state, its step, and where the batches stand."""

    reader: Reader
    evaluate: Callable[[TrainState], dict[str, Any] | None] | None
    sample: Callable[[TrainState], str] | None
    meta: dict[str, Any]

    def __init__(self, state, train_step, batches, config, checkpointer, metrics_log, stop_request):
        self.state, self.train_step, self.batches = state, train_step, batches
        self.config: TrainingConfig = config
        self.checkpointer: Checkpointer = checkpointer
        self.log: MetricsLog = metrics_log
        self.stop_request: StopRequest = stop_request
        self.watchdog = Watchdog(config.stall_after_s)
        self.host_memory = HostMemory()
        self.step = int(state.step)
        self.held_out: tuple[int, float] | None = None  # the latest evaluation: its step, its loss
        self.stopped = False
        self.like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.as_dict())

    def run(self) -> Outcome:
        if self.step == 0 and self.config.on_trouble == "rewind":
            self._save(force=True)  # there must be somewhere to go back to
        self._look()
        while self._goes_on() or self._read():  # the last step may be in trouble too
            if self._goes_on():
                self._train_one()
                self._look()
                if self.checkpointer.should_save(self.step) and not self._read():
                    self._save()
        self._save(force=True)
        if self.stopped:
            return Outcome(self.state, "stopped")
        if self.step >= self.config.steps and self._looked():
            return Outcome(self.state, "finished")
        return Outcome(self.state, "interrupted", self.stop_request.signal)

    def _goes_on(self) -> bool:
        return self.step < self.config.steps and not self.stopped and not self.stop_request.signal

    def _train_one(self) -> None:
        before, started = self.batches.state(), time.perf_counter()
        with self.watchdog.watch(f"the batch of step {self.step + 1}"):
            batch = next(self.batches)
        waited = time.perf_counter() - started
        with self.watchdog.watch(f"step {self.step + 1} to begin"):
            state, metrics = self.train_step(self.state, batch)  # returns at once: the device works on
        self.host_memory.give_back_in_time()
        if not self._read():  # the step before this one
            self.state, self.step = state, self.step + 1
            self.reader.pending = Pending(self.step, metrics, before, self.batches.state(), waited)

    def _read(self) -> bool:
        """Reads the pending step, if there is one; returns whether training went back because of it."""
        with self.watchdog.watch(f"the device, at step {self.step}"):
            trouble = self.reader.read()
        if self.config.on_trouble == "skip" and self.reader.troubles_in_a_row >= MOST_SKIPPED and not self.stopped:
            message = "step %d: %d updates in a row were left out, and training ends: it would not recover."
            get_logger(__name__).error(message, self.step, self.reader.troubles_in_a_row)
            self.stopped = True
        if trouble is None or self.config.on_trouble in ("warn", "skip"):
            return False
        if self.config.on_trouble == "stop":
            self.stopped = True
            return False
        self._rewind(trouble)
        return True

    def _rewind(self, trouble: Trouble) -> None:
        """Goes back to the last checkpoint, and on from there with the batches after the one of `trouble`."""
        self.checkpointer.wait()
        nested, meta, damaged = self.checkpointer.restore_latest(self.like)
        for step, error in damaged.items():
            message = "The checkpoint of step %d is damaged (%s). It is kept as %s."
            get_logger(__name__).error(message, step, error.why, self.checkpointer.set_aside(step))
        step, back_to = trouble.record["step"], meta["step"]
        times = len(rewinds_to(self.log.folder, back_to))
        self.stopped = times >= MOST_REWINDS
        # Before anything else: a process that is killed from here on resumes behind that batch too.
        self.log.trouble(**trouble.record, to_step=back_to, resume_data=trouble.batches_after)
        self.log.go_back(back_to)
        self.reader.go_back(step - back_to)
        self.state, self.step = self.state.from_dict(nested), back_to
        self.batches.restore(trouble.batches_after)
        if self.stopped:
            message = "step %d: training went back to step %d %d times already, and ends there."
            get_logger(__name__).error(message, step, back_to, times)
        else:
            get_logger(__name__).warning("back to the checkpoint of step %d, and on without that batch.", back_to)

    def _look(self) -> None:
        """Evaluates and samples, where it is time to and has not been done."""
        if not self._looked() and not self._read() and not self.stop_request.signal:
            if self._is_due("validation"):
                self._validate()
            if self._is_due("samples") and not self.stop_request.signal:
                with self.watchdog.watch(f"the sample of step {self.step}"):
                    self.log.sample(step=self.step, text=self.sample(self.state))  # pyright: ignore[reportOptionalCall]
            self.reader.restart_clock()

    def _looked(self) -> bool:
        return not self._is_due("validation") and not self._is_due("samples")

    def _is_due(self, name: Literal["validation", "samples"]) -> bool:
        what, every = {
            "validation": (self.evaluate, self.config.eval_every),
            "samples": (self.sample, self.config.sample_every),
        }[name]
        if what is None or every is None or self.log.last_step(name) >= self.step:
            return False
        return self.step % every == 0 or self.step == self.config.steps

    def _validate(self) -> None:
        if self.held_out is None:
            get_logger(__name__).info("step %d: the first evaluation, which compiles its own program", self.step)
        with self.watchdog.watch(f"the evaluation of step {self.step}"):
            found = self.evaluate(self.state)  # pyright: ignore[reportOptionalCall]
        if found is not None:
            self.held_out = self.step, found["loss"]
            self.log.validation(step=self.step, **found, time=round(time.time(), 3))
            get_logger(__name__).info("step %d: validation %s", self.step, describe_evaluation(found))

    def _save(self, *, force: bool = False) -> None:
        """Starts to save, and with `force` waits until it is done."""
        meta = self.meta | {"step": self.step, "data": self.batches.state()}
        loss = self.held_out[1] if self.held_out and self.held_out[0] == self.step else None
        with self.watchdog.watch(f"the checkpoint of step {self.step}"):
            for last_try in (False, True):  # the first may only say that an earlier one failed
                try:
                    self.checkpointer.save(self.step, self.state.as_dict(), meta, loss=loss, force=force)
                    if force:
                        self.checkpointer.wait()
                    break
                except CheckpointError as e:
                    if self.config.on_save_error == "stop" or (force and last_try):
                        raise
                    get_logger(__name__).error("%s Training goes on (training.on_save_error: continue).", e)
        self.reader.restart_clock()


def means(
    eval_step: Callable[[Any, Any], tuple],
    params: Any,
    batches: Iterable[Any],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], float] | None:
    """(means of all `batches`, whose sums are divided once: "loss", in nats, and maybe more; the sum of weights).

    None once `stop()` is true.
    """
    sums = []
    for batch in batches:
        if stop():
            return None
        total, weight, *more = jax.device_get(eval_step(params, batch))
        sums.append({"": weight, "loss": total} | dict(*more))
    total = {name: float(np.sum([np.asarray(s[name], np.float64) for s in sums])) for name in sums[0]}
    weight = total.pop("")
    return {name: x / weight for name, x in total.items()}, weight
