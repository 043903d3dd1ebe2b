"""Which plan a run can afford: candidates from its configuration, and steps compiled to see that they fit.

What may be chosen is what the backward pass keeps, into how many micro-batches a batch is cut, and how many tokens have
logits, or a hidden layer of the MLP, at one time. All of it changes what a step costs, and nothing that it learns.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from ..core import parse_coupling
from ..errors import ConfigError
from ..logging import get_logger
from ..memory import Candidate, Choice, Found, knee, parse_bytes, search, step_cost
from ..training import read_config
from .config import RunConfig
from .devices import Devices
from .program import Program

_SMALLEST_TILE, _SMALLEST_CHUNK = 128, 256
_SHARE_OF_DEVICE = 0.9  # of `auto`: the rest is for what XLA does not count


def plan(config: RunConfig, budget: str) -> Found:
    """Finds the fastest step of `config` for a budget. Compiles a few steps (seconds each); allocates nothing.

    Args:
      budget: of one device: bytes ("40GiB"), a part of the device ("0.5"), "auto" (most of the device), "aggressive"
        (as little as can be) or "balanced" (where less memory begins to cost much more time).

    Raises `ConfigError` for a budget that is none of these, and where no step fits, with the smallest that does.
    """
    devices = Devices.of(config)
    candidates = list(_candidates(config, devices))
    measure = lambda choice: _measured(with_choice(config, choice), devices)
    if budget == "aggressive":
        least = min(candidates, key=lambda c: (c.predicted, c.time))
        return _as_chosen(least, candidates, measure)
    if budget == "balanced":
        frontier = Found(None, tuple(candidates), 0).frontier()
        return _as_chosen(knee(frontier), candidates, measure)
    allowed = budget_bytes(budget)
    found = search(candidates, allowed, measure)
    if found.chosen is None:
        least = min((c for c in found.candidates if c.measured is not None), key=lambda c: c.bytes)
        raise ConfigError(
            f"Nothing fits into {_bytes(allowed)}: the least that a step of {config.run.name} needs is "
            f"{_bytes(least.bytes)} ({describe_choice(least.choice)}). Give a budget of "
            f"{math.ceil(least.bytes / 1e6)}MB, or a smaller --data.batch_size, --data.sequence_length or model; "
            "--optimizer.moment_dtype=bfloat16 and --model.param_dtype=bfloat16 save parameters and moments."
        )
    return found


def planned(config: RunConfig) -> RunConfig:
    """`config` with what its memory.budget comes to: as its run was begun, or, for a new run, what `plan` finds.

    So neither another machine nor another version changes a run under way.
    """
    budget = config.memory.budget
    if budget is None:
        return config
    begun = config.run.path / "config.yaml"
    there = read_config(config.run.path, RunConfig) if begun.is_file() else None
    if there is not None and there.memory.budget == budget:
        return with_choice(config, _choice_of(there))
    chosen = plan(config, budget).chosen
    assert chosen is not None
    get_logger(__name__).info(
        "memory.budget %s: %s, %s in all", budget, describe_choice(chosen.choice), _bytes(chosen.bytes)
    )
    return with_choice(config, chosen.choice)


def with_choice(config: RunConfig, choice: Choice) -> RunConfig:
    """`config` with what was chosen."""
    memory = dataclasses.replace(config.memory, plan=choice.plan, accumulation=choice.accumulation)
    model = dataclasses.replace(config.model, loss_tile=choice.loss_tile, mlp_chunk=choice.mlp_chunk)
    return dataclasses.replace(config, memory=memory, model=model)


def with_plan(config: RunConfig, name: str) -> RunConfig:
    """`config` with another plan."""
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, plan=name))


def settings(choice: Choice) -> dict[str, str]:
    """What to write into a configuration, by field."""
    return {
        "memory.plan": choice.plan,
        "memory.accumulation": str(choice.accumulation),
        "model.loss_tile": str(choice.loss_tile),
        "model.mlp_chunk": "null" if choice.mlp_chunk is None else str(choice.mlp_chunk),
    }


def budget_bytes(budget: str) -> int:
    """Bytes of one device: "40GiB", "0.5" (of the device) or "auto"."""
    try:
        share = _SHARE_OF_DEVICE if budget == "auto" else float(budget)
    except ValueError:
        share = None
    if share is not None and 0 < share <= 1:
        return int(share * device_bytes())
    try:
        return parse_bytes(budget)
    except ValueError as e:
        raise ConfigError(
            f"The budget {budget!r}: {e} It may also be a part of the device (0.5), auto, aggressive or balanced."
        ) from None


def device_bytes() -> int:
    """The memory of one device that this process can have; of a CPU, its part of what is free."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = 1024 * int(lines["MemAvailable"].split()[0])
        allowed = pathlib.Path("/sys/fs/cgroup/memory.max")
        limit = allowed.read_text().strip() if allowed.is_file() else "max"
        return min(free, int(limit) if limit.isdecimal() else free) // jax.local_device_count()
    except (OSError, KeyError, ValueError):
        raise ConfigError("This device does not tell its memory: give bytes, such as --budget=8GB.") from None


def describe_plan(config: RunConfig, found: Found) -> str:
    """What was chosen and why, and its neighbours: plans that no other one beats in both time and memory."""
    chosen = found.chosen
    assert chosen is not None
    model, data = config.model, config.data
    frontier = found.frontier()
    shown = sorted({*frontier, chosen}, key=lambda c: (c.time, c.bytes))
    fastest = shown[0].time
    i = shown.index(chosen)
    near = shown[max(i - 4, 0) : i + 5]
    rows = [("", "plan", "micro-batches", "loss tile", "MLP chunk", "memory", "", "time")]
    for c in near:
        chunk = "-" if c.choice.mlp_chunk is None else f"{c.choice.mlp_chunk:,}"
        how = "compiled" if c.measured is not None else "estimate"
        cells = (c.choice.plan, str(c.choice.accumulation), f"{c.choice.loss_tile:,}", chunk, _bytes(c.bytes), how)
        rows.append((">" if c is chosen else "", *cells, f"{c.time / fastest:.2f}"))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    compiled = sum(c.measured is not None for c in found.candidates)
    lines = {
        "model": f"{model.num_layers} layers, d_model {model.d_model}, {model.dtype}, coupling {model.coupling}; "
        f"{data.batch_size} x {data.sequence_length:,} tokens",
        "budget": f"{_bytes(found.budget)} of a device, for everything: parameters, optimizer, step",
        "looked at": f"{len(found.candidates)} plans, of which {compiled} compiled; memory of the others, and all "
        "times (relative), are estimates",
    }
    text = [f"{name:<12} {line}" for name, line in lines.items()]
    chosen_settings = " ".join(f"--{name}={value}" for name, value in settings(chosen.choice).items())
    no_budget = " --memory.budget=null" if config.memory.budget is not None else ""
    return "\n".join([*text, "", *table, "", f"{'set':<12} {chosen_settings}{no_budget}"])


def plan_json(config: RunConfig, found: Found) -> dict[str, Any]:
    """All candidates, and which one was chosen, for `json.dump`."""
    assert found.chosen is not None
    row = lambda c: (
        dataclasses.asdict(c.choice) | {"bytes": c.bytes, "compiled": c.measured is not None, "time": c.time}
    )
    return {
        "run": config.run.name,
        "budget": found.budget,
        "chosen": row(found.chosen),
        "settings": settings(found.chosen.choice),
        "candidates": [row(c) for c in found.candidates],
    }


def describe_choice(choice: Choice) -> str:
    """ "plan nothing, 4 micro-batches, 128 tokens of logits"."""
    chunk = "" if choice.mlp_chunk is None else f", {choice.mlp_chunk} tokens of the MLP"
    several = f", {choice.accumulation} micro-batches" if choice.accumulation > 1 else ""
    return f"plan {choice.plan}{several}, {choice.loss_tile} tokens of logits{chunk}"


def _as_chosen(candidate: Candidate, candidates: list[Candidate], measure) -> Found:
    measured = dataclasses.replace(candidate, measured=measure(candidate.choice))
    others = [measured if c is candidate else c for c in candidates]
    return Found(measured, tuple(sorted(others, key=lambda c: (c.time, c.bytes))), measured.bytes)


def _candidates(config: RunConfig, devices: Devices) -> Iterator[Candidate]:
    reversible = parse_coupling(config.model.coupling).reversible
    plans = ["nothing", "attention", "all"] if reversible else ["inputs", "all"]
    try:
        shapes = Program.of(with_plan(config, plans[1]), devices).shapes
    except ConfigError:  # attention that cannot keep what it computes (cuDNN)
        plans.remove("attention")
        shapes = Program.of(with_plan(config, "nothing"), devices).shapes
    rows, length = config.data.batch_size // devices.count, config.data.sequence_length
    of_params = sum(math.prod(_on_device(x)) for x in jax.tree.leaves(shapes.params))
    state = sum(math.prod(_on_device(x)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    for accumulation in (n for n in range(1, rows + 1) if rows % n == 0):
        tokens = rows * length // accumulation
        for loss_tile in _halvings(min(config.model.loss_tile, tokens), _SMALLEST_TILE):
            for mlp_chunk in _chunks(config):
                model = dataclasses.replace(config.model, loss_tile=loss_tile, mlp_chunk=mlp_chunk)
                for name in plans:
                    cost = step_cost(
                        model,
                        rows,
                        length,
                        plan=name,
                        accumulation=accumulation,
                        num_params=of_params,
                        state_bytes=state,
                    )
                    yield Candidate(Choice(name, accumulation, loss_tile, mlp_chunk), cost.time, cost.bytes)


def _chunks(config: RunConfig) -> list[int | None]:
    if config.model.granularity == "block":
        return [None]
    longest = config.model.mlp_chunk or config.data.sequence_length
    return [config.model.mlp_chunk, *list(_halvings(longest, _SMALLEST_CHUNK))[1:]]


def _halvings(n: int, smallest: int) -> list[int]:
    found = [n]
    while found[-1] // 2 >= smallest:
        found.append(found[-1] // 2)
    return found


def _measured(config: RunConfig, devices: Devices) -> int:
    """The bytes of everything on one device, as XLA compiles the step."""
    get_logger(__name__).info("compiling %s ...", describe_choice(_choice_of(config)))
    analysis = Program.of(config, devices).compile().memory_analysis()
    beside = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return beside + analysis.temp_size_in_bytes


def _choice_of(config: RunConfig) -> Choice:
    return Choice(config.memory.plan, config.memory.accumulation, config.model.loss_tile, config.model.mlp_chunk)


def _on_device(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of the part of an array that one device holds."""
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def _bytes(n: float) -> str:
    if n < 1e6:
        return f"{n / 1e3:.0f} kB"
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
