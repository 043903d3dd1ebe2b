"""Which plan a run can afford: candidates from its configuration, and steps compiled to see that they fit.

    plan      the fastest step for a budget of memory
    largest   the longest context, the deepest model or the largest batch for it

What may be chosen is what the backward pass keeps, into how many micro-batches a batch is cut, and how many tokens have
logits, or a hidden layer of the MLP, at one time. All of it changes what a step costs, and nothing that it learns.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ..core import parse_coupling
from ..data import DataConfig, ImagesConfig
from ..errors import ConfigError, nearest
from ..logging import get_logger
from ..memory import (
    Candidate,
    Choice,
    Cost,
    Found,
    budget_bytes,
    by_the_clock,
    in_turn,
    knee,
    known_hardware,
    search,
    step_cost,
)
from ..memory import largest as largest_size
from ..models import DecoderConfig, EncoderConfig, VisionConfig
from ..training import TrainState, read_config
from . import step_bytes
from .config import MemoryConfig, RunConfig
from .devices import Devices
from .plan_report import describe_choice, in_bytes
from .program import Program, bytes_of_step, stepper

_SMALLEST_TILE, _SMALLEST_CHUNK = 128, 256
_ROUNDS = 5  # of steps that are timed
SIZES = {"context": "data.sequence_length", "layers": "model.num_layers", "batch": "data.batch_size"}


def plan(config: RunConfig, budget: str, hardware: str | None = None, *, timed: bool = False) -> Found:
    """Finds the fastest step of `config` for a budget. Compiles a few steps (seconds each); allocates nothing.

    Args:
      budget: of one device: bytes ("40GiB"), a part of the device ("0.5"), "auto" (most of the device), "aggressive"
        (as little as can be) or "balanced" (where less memory begins to cost much more time).
      hardware: the device that parts of it and estimates of time are for, a name of `memory.HARDWARE`; None: the one
        that is here. Programs are compiled for the one that is here all the same.
      timed: takes steps of a few that fit, one of each number of micro-batches, and chooses by the clock.

    Raises `ConfigError` for a budget that is none of these, and where no step fits, with the smallest that does.
    """
    if not timed:
        return _plan(config, budget, hardware, _Compiler(config, to_run=False).bytes_of)
    if hardware is not None:
        raise ConfigError(f"Steps are timed on the device that is here, not on {hardware}: leave one of both out.")
    if budget == "aggressive":
        raise ConfigError("The budget aggressive is one plan, the smallest: there are no others to time.")
    compiler = _Compiler(config, to_run=True)
    return by_the_clock(_plan(config, budget, None, compiler.bytes_of), compiler.bytes_of, compiler.seconds_of)


def _plan(config: RunConfig, budget: str, hardware: str | None, measure: Callable[[Choice], int]) -> Found:
    options = list(candidates(config, hardware))
    if budget == "aggressive":
        least = min(options, key=lambda c: (c.predicted, c.time))
        return _as_chosen(least, options, measure)
    if budget == "balanced":
        frontier = Found(None, tuple(options), 0).frontier()
        return _as_chosen(knee(frontier), options, measure)
    allowed = budget_bytes(budget, hardware)
    found = search(options, allowed, measure)
    if found.chosen is None:
        least = min((c for c in found.candidates if c.measured is not None), key=lambda c: c.bytes)
        raise _nothing_fits(config, least, allowed)
    return found


def largest(
    config: RunConfig, what: str, budget: str, hardware: str | None = None
) -> tuple[RunConfig, Found, dict[str, str]]:
    """Finds how far one size of `config` can grow in a budget: `config` with that size, the step that fits, and what
    was set, by field.

    Compiles a few steps, each of the plan that needs the least memory.

    Args:
      what: a name of `SIZES`. "context" (in tokens), "layers", or "batch" (rows, without micro-batches).
      budget, hardware: as for `plan`, but not "aggressive" or "balanced".

    Raises `ConfigError` for what is none of these, and where the smallest size does not fit.
    """
    if what not in SIZES:
        raise ConfigError(f"There is no size {what!r}.{nearest(what, SIZES)} Sizes are {', '.join(SIZES)}.")
    if budget in ("aggressive", "balanced"):
        raise ConfigError(f"The largest {what} needs a budget in bytes, or a part of the device, but got {budget!r}.")
    allowed = budget_bytes(budget, hardware)
    if what == "context" and isinstance(config.data, ImagesConfig):
        raise ConfigError("The context of images is as long as they have patches: ask for layers or batch.")
    unit = {"context": 128, "layers": 1, "batch": Devices.of(config).count}[what]
    tried: dict[int, tuple[RunConfig, Found]] = {}

    def bytes_of(size: int) -> int:
        get_logger(__name__).info("%s = %s", SIZES[what], f"{size:,}")
        sized = _sized(config, what, size)
        options = list(candidates(sized, hardware))
        if what == "batch":
            options = [c for c in options if c.choice.accumulation == 1]
        least = min(options, key=lambda c: (c.predicted, c.time))
        found = _as_chosen(least, options, _Compiler(sized, to_run=False).bytes_of)
        tried[size] = sized, dataclasses.replace(found, budget=allowed)
        return found.budget

    start = {"context": config.row_length, "layers": config.model.num_layers, "batch": config.data.batch_size}
    found = largest_size(bytes_of, allowed, start=start[what], unit=unit)
    if found is None:
        sized, at = tried[min(tried)]
        assert at.chosen is not None
        raise _nothing_fits(sized, at.chosen, allowed)
    sized, at = tried[found[0]]
    given = {SIZES[what]: str(found[0])}
    if (longest := _max_length(sized)) != _max_length(config):
        given["model.max_length"] = str(longest)
    return sized, at, given


def settled(config: RunConfig) -> tuple[RunConfig, tuple[Program, Any] | None]:
    """`config` with a plan, and its step and that step compiled, where this had to be done to find the plan.

    A plan that is "auto" becomes what its run was begun with, so that neither another machine nor another version
    changes a run under way; for a new run, what `plan` finds.
    """
    memory = config.memory
    if not memory.is_open:
        if memory.budget != MemoryConfig().budget:
            get_logger(__name__).warning(
                "memory.budget %s is not used: memory.plan is %r, not auto", memory.budget, memory.plan
            )
        return config, None
    begun = config.run.path / "config.yaml"
    there = read_config(config.run.path, RunConfig) if begun.is_file() else None
    if there is not None and there.memory.budget == memory.budget:
        return with_choice(config, _choice_of(there)), None
    if memory.accumulation != 1:
        get_logger(__name__).warning(
            "memory.accumulation %d is not used: memory.plan auto decides it as well", memory.accumulation
        )
    compiler = _Compiler(config, to_run=True)
    chosen = _plan(config, memory.budget, None, compiler.bytes_of).chosen
    assert chosen is not None
    get_logger(__name__).info(
        "memory.budget %s: %s, %s in all", memory.budget, describe_choice(chosen.choice), in_bytes(chosen.bytes)
    )
    return with_choice(config, chosen.choice), compiler.latest


def with_choice(config: RunConfig, choice: Choice) -> RunConfig:
    """`config` with what was chosen."""
    memory = dataclasses.replace(config.memory, plan=choice.plan, accumulation=choice.accumulation)
    tile = {} if choice.loss_tile is None else {"loss_tile": choice.loss_tile}
    model = dataclasses.replace(config.model, mlp_chunk=choice.mlp_chunk, **tile)
    return dataclasses.replace(config, memory=memory, model=model)


def _max_length(config: RunConfig) -> int | None:
    """Of learned positions of text."""
    return config.model.max_length if isinstance(config.model, DecoderConfig | EncoderConfig) else None


def _sized(config: RunConfig, what: str, size: int) -> RunConfig:
    """`config` with one of `SIZES`, and what goes with it."""
    model, data, memory = config.model, config.data, config.memory
    if what == "layers":
        model = dataclasses.replace(model, num_layers=size)
    elif what == "context":
        assert isinstance(data, DataConfig)
        data = dataclasses.replace(data, sequence_length=size)
        if isinstance(model, DecoderConfig | EncoderConfig) and model.positions == "learned":
            model = dataclasses.replace(model, max_length=max(size, model.max_length))
    else:
        data = dataclasses.replace(data, batch_size=size)
        memory = dataclasses.replace(memory, accumulation=1)
    return dataclasses.replace(config, model=model, data=data, memory=memory)


def _nothing_fits(config: RunConfig, least: Candidate, allowed: int) -> ConfigError:
    return ConfigError(
        f"Nothing fits into {in_bytes(allowed)}: the least that a step of {config.run.name} needs is "
        f"{in_bytes(least.bytes)} ({describe_choice(least.choice)}). Give a budget of "
        f"{math.ceil(least.bytes / 1e6)}MB, or a smaller --data.batch_size, --data.sequence_length or model; "
        "--optimizer.moment_dtype=bfloat16 and --model.param_dtype=bfloat16 save parameters and moments."
    )


def _as_chosen(candidate: Candidate, options: list[Candidate], measure) -> Found:
    measured = dataclasses.replace(candidate, measured=measure(candidate.choice))
    others = [measured if c is candidate else c for c in options]
    return Found(measured, tuple(sorted(others, key=lambda c: (c.time, c.bytes))), measured.bytes)


def candidates(config: RunConfig, hardware: str | None = None) -> Iterator[Candidate]:
    """Every step that may be chosen for `config`, with predictions of its time and bytes."""
    devices = Devices.of(config)
    with_plan = lambda name: dataclasses.replace(config, memory=dataclasses.replace(config.memory, plan=name))
    levels = levels_of(config)
    shapes = Program.of(with_plan(levels[0]), devices).shapes
    plans = levels + _in_parts(levels, config.model.run_lengths)
    rows, length = config.data.batch_size // devices.count, config.row_length
    most = 1 if config.optimizer.in_backward is not None else rows
    for accumulation in (n for n in range(1, most + 1) if rows % n == 0):
        for loss_tile in tiles(config, rows * length // accumulation):
            for mlp_chunk in chunks(config):
                for name in plans:
                    choice = Choice(name, accumulation, loss_tile, mlp_chunk)
                    cost = cost_of(with_choice(config, choice), shapes, devices, hardware)
                    yield Candidate(choice, cost.time, cost.bytes)


def cost_of(config: RunConfig, shapes: TrainState, devices: Devices, hardware: str | None = None) -> Cost:
    """What a step of `config` costs on one device, as counted by hand. `shapes` are those of its state."""
    in_backward = config.optimizer.in_backward is not None
    cost = step_cost(
        config.model,
        config.data.batch_size // devices.count,
        config.row_length,
        plan=config.memory.plan,
        accumulation=config.memory.accumulation,
        num_params=sum(on_device(x) for x in jax.tree.leaves(shapes.params)),
        num_updated=sum(map(on_device, _of_stacks(shapes.params))) if in_backward else 0,
        num_frozen=sum(on_device(x) for x in jax.tree.leaves(shapes.frozen)),
        state_bytes=sum(on_device(x) * x.dtype.itemsize for x in jax.tree.leaves(shapes)),
        balance=None if hardware is None else known_hardware(hardware).balance,
    )
    return dataclasses.replace(cost, time=2 * cost.time) if config.optimizer.in_backward == "two_sweeps" else cost


def _of_stacks(params: dict[str, Any]) -> list[jax.ShapeDtypeStruct]:
    """Those that layers of stacks have."""
    inside = lambda name, x: jax.tree.leaves(x) if name == "stack" else _of_stacks(x) if isinstance(x, dict) else []
    return [leaf for name, x in params.items() for leaf in inside(name, x)]


def levels_of(config: RunConfig) -> list[str]:
    """Plans for all layers that the coupling allows: each keeps more than the one before."""
    return ["nothing", "attention", "all"] if parse_coupling(config.model.coupling).reversible else ["inputs", "all"]


def _in_parts(levels: list[str], run_lengths: tuple[int, ...]) -> list[str]:
    """Plans between two levels: the last layers keep more than the first. (Not where layers remain over a period.)"""
    numbers = sorted({run_lengths[0] * eighths // 8 for eighths in range(1, 8)} - {0}) if len(run_lengths) == 1 else []
    return [f"{less}, {n} {more}" for less, more in itertools.pairwise(levels) for n in numbers]


def on_device(x: jax.ShapeDtypeStruct) -> int:
    """How many elements of an array one device holds."""
    return math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape))


def tiles(config: RunConfig, tokens: int) -> list[int] | list[None]:
    """How many of `tokens` tokens may have logits at one time: as many as the config says, or fewer. None: all have."""
    if isinstance(config.model, VisionConfig):
        return [None]
    return _halvings(min(config.model.loss_tile, tokens), _SMALLEST_TILE)


def chunks(config: RunConfig) -> list[int | None]:
    """How many tokens may have a hidden layer of the MLP at one time: as many as the config says, or fewer."""
    if config.model.granularity == "block":
        return [None]
    longest = config.model.mlp_chunk or config.row_length
    return [config.model.mlp_chunk, *list(_halvings(longest, _SMALLEST_CHUNK))[1:]]


def _halvings(n: int, smallest: int) -> list[int]:
    found = [n]
    while found[-1] // 2 >= smallest:
        found.append(found[-1] // 2)
    return found


class _Compiler:
    """Compiles steps of one configuration that differ in what may be chosen.

    `latest` is the step that was asked for last, where it had to be compiled.
    """

    def __init__(self, config: RunConfig, *, to_run: bool):
        self._to_run, self._config, self._devices = to_run, config, Devices.of(config)
        self.latest: tuple[Program, Any] | None = None

    def bytes_of(self, choice: Choice) -> int:
        """The bytes of everything on one device, as XLA compiles the step, or compiled it before."""
        self.latest = None
        config = with_choice(self._config, choice)
        if (known := step_bytes.recall(config, to_run=self._to_run)) is not None:
            get_logger(__name__).info("known from before: %s, %s", describe_choice(choice), in_bytes(known))
            return known
        get_logger(__name__).info("compiling %s ...", describe_choice(choice))
        program = Program.of(config, self._devices)
        self.latest = program, program.compile(to_run=self._to_run)
        found = bytes_of_step(self.latest[1])
        step_bytes.remember(config, found, to_run=self._to_run)
        return found

    def seconds_of(self, choices: list[Choice]) -> list[float]:
        """The seconds that a step of each takes, in the median of some rounds, in which they take turns."""
        programs = [Program.of(with_choice(self._config, choice), self._devices) for choice in choices]
        take_step = stepper(self._config, programs[0])
        steps = []
        for choice, program in zip(choices, programs, strict=True):
            get_logger(__name__).info("to be timed: %s", describe_choice(choice))
            steps.append(functools.partial(take_step, program.compile()))
        get_logger(__name__).info("timing %d plans in turn, %d steps of each ...", len(steps), _ROUNDS)
        seconds = in_turn(steps, _ROUNDS)
        of_round = seconds.mean(axis=1, keepdims=True)
        return (np.median(seconds / of_round, axis=0) * np.median(of_round)).tolist()


def _choice_of(config: RunConfig) -> Choice:
    tile = None if isinstance(config.model, VisionConfig) else config.model.loss_tile
    return Choice(config.memory.plan, config.memory.accumulation, tile, config.model.mlp_chunk)
