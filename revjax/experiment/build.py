"""A run from its configuration: text, model, optimizer and compiled step.

`build` finds every mistake that can be found without training, and leaves the run folder as it is.
"""

import dataclasses
import secrets
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx

from ..checkpoint import Checkpointer
from ..data import Corpus, Images, RowBatches
from ..errors import ConfigError, DamagedCheckpointError
from ..logging import get_logger
from ..memory import device_bytes
from ..models import CheckReport, EncoderDecoderConfig, VisionConfig, check, loss_of, make_model
from ..training import (
    RunFolder,
    Skeleton,
    TrainState,
    check_installed,
    make_eval_step,
    make_optimizer,
    make_schedule,
    rewinds_to,
)
from .config import FREE, RunConfig
from .devices import Devices
from .plan_report import in_bytes
from .planning import cost_of, levels_of, settled
from .program import Program
from .reading import reading_of
from .trained import check_start, has_checkpoints

_HOPELESS = 4  # times the memory that is free: counts by hand are not that far off


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is ready to be trained. See `build`."""

    config: RunConfig
    folder: RunFolder
    corpus: Corpus | Images
    batches: RowBatches
    skeleton: Skeleton
    state: TrainState
    train_step: Any  # compiled: (state, batch) -> (state, metrics)
    devices: Devices
    eval_step: Any  # (params, batch) -> what the loss returns: sums of losses and of weights
    run_id: str  # the same whenever the run goes on from a checkpoint of its own
    damaged: dict[int, DamagedCheckpointError]  # checkpoints later than the one that the run continues from

    @property
    def is_dry(self) -> bool:
        """Whether there are only shapes, and nothing to train."""
        return isinstance(self.state.step, jax.ShapeDtypeStruct)

    @property
    def start_step(self) -> int:
        """0, or the step of the checkpoint that the run continues from."""
        return 0 if self.is_dry else int(self.state.step)


def build(config: RunConfig, *, dry: bool = False, allow_change: Collection[str] = ()) -> Experiment:
    """Returns all that `run` needs, with the step compiled; a run that was begun stands at its latest checkpoint.

    What the step keeps and how the batch is cut is settled first, where memory.plan is "auto" (`settled`). The step is
    compiled while the text is read and the state is made.

    Args:
      dry: parameters and state are shapes only: everything is checked and compiled, and nothing can be trained.
      allow_change: names of fields in which a run that was begun may go on with other values.

    Raises a `RevjaxError` for a run folder, text or configuration that cannot work. Writes nothing but the
    caches (tokenised text, compiled programs and what they take).
    """
    knows_steps = config.training.epochs is None
    check_installed(config.training)
    devices = Devices.of(config)
    reading = reading_of(config)
    make_optimizer(config.optimizer, make_schedule(config.optimizer, config.training.steps))
    if config.training.start_from is not None and not has_checkpoints(config.run.path):
        check_start(config.training.start_from, config.model, reading.tokenizer)
    config, made = settled(config)
    devices = Devices.of(config)  # micro-batches may be others now
    if knows_steps:  # before any work, and after what may be wrong with the configuration alone
        found = RunFolder(config.run.path, config, ignore=FREE, allow=allow_change)
        if not dry:
            found.refuse_claimed()
    background = ThreadPoolExecutor(1, "compile")
    try:
        program, compiled = _compiling(config, devices, made, background, dry) if knows_steps else (None, None)
        corpus = reading.load()
        rows = reading.batches(corpus)
        config = config.for_epochs_of(rows.rows_per_epoch)
        folder = RunFolder(config.run.path, config, ignore=FREE, allow=allow_change)
        if program is None or compiled is None:
            program, compiled = _compiling(config, devices, None, background, dry)
        # Not earlier: what is wrong with the text is one message, and nothing before it.
        get_logger(__name__).info("compiling the training step")
        started = time.perf_counter()
        state, meta, damaged = program.shapes, {}, {}
        if not dry:
            other_data = any(name.startswith("data.") or name == "training.seed" for name in allow_change)
            if Checkpointer(folder.checkpoints).latest_step() is None:
                state = program.begin(config.training.start_from, reading.tokenizer)
            else:
                state, meta, damaged = _latest(program.shapes, folder, rows, other_data)
        train_step = compiled.result()
        get_logger(__name__).info("the training step is ready after %.0f s", time.perf_counter() - started)
    finally:
        background.shutdown(wait=False)
    eval_step = jax.jit(make_eval_step(program.skeleton, loss_of(config.model)))
    return Experiment(
        config=config,
        folder=folder,
        corpus=corpus,
        batches=rows,
        skeleton=program.skeleton,
        state=state,
        train_step=train_step,
        devices=devices,
        eval_step=lambda params, batch: eval_step(params, devices.deal(batch)),
        run_id=meta["run_id"] if _is_of(meta, config) else secrets.token_hex(4),
        damaged=damaged,
    )


def _compiling(
    config: RunConfig, devices: Devices, made: tuple[Program, Any] | None, background: ThreadPoolExecutor, dry: bool
) -> tuple[Program, Future]:
    """The step, and what will be the compiled one. Not compiled is one so large that there is no point in it."""
    if made:
        return made[0], background.submit(lambda: made[1])
    program = Program.of(config, devices)
    if message := _hopeless(config, devices, program):
        if not dry:
            raise ConfigError(message)
        get_logger(__name__).warning("%s", message)
    return program, background.submit(program.compile)


def _hopeless(config: RunConfig, devices: Devices, program: Program) -> str | None:
    """What to say where a step needs far more memory than there is."""
    try:
        there = device_bytes()
    except ConfigError:  # it does not tell
        return None
    needed = cost_of(config, program.shapes, devices).bytes
    if needed <= _HOPELESS * there:
        return None
    return (
        f"A step of {config.run.name} needs about {in_bytes(needed)} on each device, and {in_bytes(there)} are free. "
        "Give a smaller --data.batch_size, --data.sequence_length or model, or more micro-batches "
        "(--memory.accumulation)."
    )


def _is_of(meta: dict[str, Any], config: RunConfig) -> bool:
    """Whether a checkpoint with `meta` is of the run of that name, and not of one that its folder was copied from."""
    return "run_id" in meta and meta["config"]["run"]["name"] == config.run.name


def _latest(shapes: TrainState, folder: RunFolder, rows: RowBatches, other_data: bool) -> tuple[TrainState, dict, dict]:
    """The state of the latest checkpoint that is whole, its meta, and what is wrong with later ones.

    Moves `rows` to where it was.
    """
    with Checkpointer(folder.checkpoints) as checkpointer:
        nested, meta, damaged = checkpointer.restore_latest(shapes.as_dict())
    rewinds = rewinds_to(folder.path, meta["step"])  # without the batches that sent training back to this step
    rows.restore(rewinds[-1]["resume_data"] if rewinds else meta["data"], allow_change=other_data)
    return shapes.from_dict(nested), meta, damaged


def check_model(config: RunConfig) -> CheckReport:
    """Checks the model of `config`, untrained, on two rows of random tokens, or images."""
    plan = levels_of(config)[0] if config.memory.is_open else config.memory.plan
    shape = config.model
    model = make_model(shape, plan=plan, rngs=nnx.Rngs(config.training.seed))
    key = jax.random.key(config.training.seed)
    example: Any
    if isinstance(shape, VisionConfig):
        example = jax.random.normal(key, (2, shape.image_size, shape.image_size, shape.channels))
    else:
        example = jax.random.randint(key, (2, min(config.row_length, 128)), 0, shape.vocab_size)
    if isinstance(shape, EncoderDecoderConfig):
        example = (example, example)  # source and target
    return check(model, example, key=jax.random.fold_in(key, 1))
