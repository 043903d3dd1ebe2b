"""What would make a training step smaller or faster, setting by setting, from costs counted by hand."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ..core.plan import keeps
from ..training import TrainState, make_optimizer
from .config import RunConfig
from .devices import Devices
from .plan_report import in_bytes
from .planning import chunks, cost_of, levels_of, on_device, tiles

_WORTH_IT = 0.02  # of all bytes, or of the time


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """One setting to change.

    Attributes:
      setting: as the command line has it, "--memory.accumulation=2".
      bytes: that it adds on one device, estimated; negative where it saves.
      time: of the step with it, relative to the step without, estimated.
    """

    setting: str
    bytes: int
    time: float


def suggestions(config: RunConfig, shapes: TrainState, devices: Devices) -> list[Suggestion]:
    """Single settings that save a part of the memory, or of the time, of a step; first those that save most memory.

    None of them changes what is computed, but for the order of sums, and for moments in bf16.

    Args:
      shapes: of the state of `config`, with shardings.
    """
    here = cost_of(config, shapes, devices)
    found = []
    for setting, other, state in _changes(config, shapes):
        cost = cost_of(other, shapes, devices)
        found.append(Suggestion(setting, cost.bytes + state - here.bytes, cost.time / here.time))
    worth_it = [s for s in found if s.bytes < -_WORTH_IT * here.bytes or s.time < 1 - _WORTH_IT]
    return sorted(worth_it, key=lambda s: (s.bytes, s.time))


def describe_suggestions(found: list[Suggestion]) -> str:
    """A line for each; says so where there are none."""
    if not found:
        return f"{'advice':<12} no single setting would save memory or time"
    wide = max(len(s.setting) for s in found)
    lines = [
        f"{s.setting:<{wide}}  {'-+'[s.bytes >= 0] + in_bytes(abs(s.bytes)):>9}   {s.time:.2f} of the time"
        for s in found
    ]
    head = "single settings, and what each would change (estimates; what is learned stays the same):"
    return "\n".join([f"{'advice':<12} {head}", *(f"{'':<12} {line}" for line in lines)])


def _changes(config: RunConfig, shapes: TrainState) -> Iterator[tuple[str, RunConfig, int]]:
    """(setting, `config` with it, bytes of the state that come with it)"""
    memory, model = config.memory, config.model
    for name in levels_of(config):
        if keeps(name, model.run_lengths) != keeps(memory.plan, model.run_lengths):
            yield f"--memory.plan={name}", _with(config, memory={"plan": name}), 0
    rows = config.data.batch_size
    most = rows if config.optimizer.in_backward is None else 1
    more = next((n for n in range(memory.accumulation + 1, most + 1) if rows % n == 0), None)
    if more is not None:
        yield f"--memory.accumulation={more}", _with(config, memory={"accumulation": more}), 0
    for tile in tiles(config, rows * config.row_length // memory.accumulation)[1:2]:
        yield f"--model.loss_tile={tile}", _with(config, model={"loss_tile": tile}), 0
    for chunk in chunks(config)[1:2]:
        yield f"--model.mlp_chunk={chunk}", _with(config, model={"mlp_chunk": chunk}), 0
    if config.optimizer.moment_dtype != "bfloat16":
        low = _with(config, optimizer={"moment_dtype": "bfloat16"})
        yield "--optimizer.moment_dtype=bfloat16", low, _moments(low, shapes) - _moments(config, shapes)


def _with(config: RunConfig, **sections: dict) -> RunConfig:
    change = lambda name, fields: dataclasses.replace(getattr(config, name), **fields)
    return dataclasses.replace(config, **{name: change(name, fields) for name, fields in sections.items()})


def _moments(config: RunConfig, shapes: TrainState) -> int:
    """The bytes of the optimizer's arrays on one device, which are cut up as the parameters are."""
    params = jax.tree.leaves(shapes.params)
    state = jax.eval_shape(make_optimizer(config.optimizer, lambda step: jnp.zeros(())).init, shapes.params)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return whole * sum(map(on_device, params)) // sum(x.size for x in params)
