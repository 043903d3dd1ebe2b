"""The step of a run, before anything is allocated or read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ..data import Tokenizer
from ..errors import ConfigError
from ..memory import options_to_measure
from ..models import VisionConfig, make_model, without_adapters
from ..training import (
    Skeleton,
    TrainState,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    split,
    split_abstract,
    step_compiler_options,
    united,
)
from .config import RunConfig
from .devices import Devices
from .reading import batch_of, training_loss
from .trained import parameters_of


@dataclasses.dataclass(frozen=True)
class Program:
    """The step of a run, ready to be compiled, and how its state is made. Needs no text."""

    devices: Devices
    make_model: Callable[[], nnx.Module]
    start: Callable[[dict[str, Any]], TrainState]  # from all parameters
    skeleton: Skeleton
    shapes: TrainState  # without values, but with shardings
    batch: dict[str, jax.ShapeDtypeStruct]
    lowered: Any  # the jitted step

    @staticmethod
    def of(config: RunConfig, devices: Devices) -> "Program":
        training = config.training
        param_key, step_key = jax.random.split(jax.random.key(training.seed))
        make = lambda: make_model(
            devices.model(config.model), plan=config.memory.plan, **devices.hooks, rngs=nnx.Rngs(param_key)
        )
        skeleton, values = split_abstract(make)
        schedule = make_schedule(config.optimizer, training.steps)
        optimizer = make_optimizer(config.optimizer, schedule)

        def start(values: dict[str, Any]) -> TrainState:
            params, frozen = skeleton.divide(values)
            return init_state(
                params,
                optimizer,
                step_key,
                frozen=frozen,
                ema=training.ema_decay is not None,
                loss_scale=config.model.dtype == "float16",
                spikes=training.spike_sigmas is not None,
            )

        shapes = devices.shapes_of_state(jax.eval_shape(start, values))
        step = make_train_step(
            skeleton,
            training_loss(config),
            optimizer,
            schedule=schedule,
            on_trouble=training.on_trouble,
            accumulation=config.memory.accumulation,
            ema_decay=training.ema_decay,
            spike_sigmas=training.spike_sigmas,
            in_backward=config.optimizer.in_backward,
        )
        batch = devices.shapes_of_batch(batch_of(config))
        try:
            lowered = devices.jit(step, shapes).lower(shapes, batch)
        except ValueError as e:
            if not str(e).startswith(("The plan keeps what is named", "The plan 'host' keeps")):
                raise
            raise ConfigError(f"memory.plan {config.memory.plan!r}: {e}") from None
        return Program(devices, make, start, skeleton, shapes, batch, lowered)

    def compile(self, *, to_run: bool = True) -> Any:
        """The step, compiled for the devices; sooner where it is only asked for its memory."""
        backend = jax.default_backend()
        quick = {} if to_run else options_to_measure(backend)
        return self.lowered.compile(compiler_options=step_compiler_options(backend) | quick)

    def begin(self, start_from: str | None, tokenizer: Tokenizer | None) -> TrainState:
        """The state before the first step, its arrays made where they belong: random, or from the run `start_from`.

        Adapters always begin anew.
        """
        random = lambda: split(self.make_model())[1]
        if start_from is None:
            return self.devices.make(lambda: self.start(random()), self.shapes)
        base = without_adapters(united(self.shapes.params, self.shapes.frozen))
        params = parameters_of(start_from, base, tokenizer)
        return self.devices.make(lambda params: self.start(united(random(), params)), self.shapes, params)


def stepper(config: RunConfig, program: Program, seed: int = 0) -> Callable[[Any], None]:
    """A function that takes one step of a compiled program, on random tokens, and waits until it is done.

    Its state is one for all programs that it is given: they may differ in what a planner chooses.
    """
    state = program.begin(None, None)
    keys = jax.random.split(jax.random.key(seed), len(program.batch))
    ranges = {"weights": (1, 2), "images": (0, 256)}
    if isinstance(config.model, VisionConfig):
        ranges["labels"] = (0, config.model.num_classes)
    else:
        ranges["tokens"] = (0, config.model.vocab_size)
    batch = program.devices.deal(
        {
            name: jax.random.randint(key, shape.shape, *ranges.get(name, (0, 1))).astype(shape.dtype)
            for key, (name, shape) in zip(keys, program.batch.items(), strict=True)
        }
    )

    def step(compiled: Any) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch))

    return step


def bytes_of_step(compiled: Any) -> int:
    """The bytes of everything on one device while a compiled step runs: state, batch, and what it makes meanwhile."""
    analysis = compiled.memory_analysis()
    beside = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return beside + analysis.temp_size_in_bytes
