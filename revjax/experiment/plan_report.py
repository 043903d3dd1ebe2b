"""What a search for a plan came to, in words and as data."""

import dataclasses
import shlex
from typing import Any

from ..memory import Choice, Found
from .config import RunConfig


def settings(choice: Choice) -> dict[str, str]:
    """What to write into a configuration, by field."""
    return {
        "memory.plan": choice.plan,
        "memory.accumulation": str(choice.accumulation),
        **({} if choice.loss_tile is None else {"model.loss_tile": str(choice.loss_tile)}),
        "model.mlp_chunk": "null" if choice.mlp_chunk is None else str(choice.mlp_chunk),
    }


def describe_plan(config: RunConfig, found: Found, sizes: dict[str, str] | None = None) -> str:
    """What was chosen and why, and its neighbours: plans that no other one beats in both time and memory.

    `sizes` are settings of the config that were looked for too.
    """
    chosen, sizes = found.chosen, sizes or {}
    assert chosen is not None
    model, data = config.model, config.data
    frontier = found.frontier()
    timed = [c for c in found.candidates if c.seconds is not None]
    shown = sorted({*frontier, *timed, chosen}, key=lambda c: (c.time, c.bytes))
    fastest = shown[0].time
    i = shown.index(chosen)
    near = [c for k, c in enumerate(shown) if abs(k - i) <= 4 or c in timed]
    rows = [("", "plan", "micro-batches", "loss tile", "MLP chunk", "memory", "", "time", "a step" if timed else "")]
    for c in near:
        tile, chunk = ("-" if n is None else f"{n:,}" for n in (c.choice.loss_tile, c.choice.mlp_chunk))
        how = "compiled" if c.measured is not None else "estimate"
        cells = (c.choice.plan, str(c.choice.accumulation), tile, chunk, in_bytes(c.bytes), how)
        took = "" if c.seconds is None else f"{c.seconds:.3g} s"
        rows.append((">" if c is chosen else "", *cells, f"{c.time / fastest:.2f}", took))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    compiled = sum(c.measured is not None for c in found.candidates)
    lines = {
        "model": f"{model.num_layers} layers, d_model {model.d_model}, {model.dtype}, coupling {model.coupling}; "
        f"{data.batch_size} x {config.row_length:,} tokens",
        "budget": f"{in_bytes(found.budget)} of a device, for everything: parameters, optimizer, step",
        "looked at": f"{len(found.candidates)} plans, of which {compiled} compiled; memory of the others, and "
        "relative times, are estimates",
    }
    if timed:
        lines["timed"] = f"{len(timed)} of them, in turn, on this device (a step: median, in seconds)"
    text = [f"{name:<12} {line}" for name, line in lines.items()]
    to_write = sizes | settings(chosen.choice)
    words = " ".join(f"--{name}={shlex.quote(value)}" for name, value in to_write.items())
    return "\n".join([*text, "", *table, "", f"{'set':<12} {words}"])


def plan_json(config: RunConfig, found: Found, sizes: dict[str, str] | None = None) -> dict[str, Any]:
    """All candidates, and which one was chosen, for `json.dump`; arguments as of `describe_plan`."""
    assert found.chosen is not None
    row = lambda c: (
        dataclasses.asdict(c.choice)
        | {"bytes": c.bytes, "compiled": c.measured is not None, "time": c.time, "seconds": c.seconds}
    )
    return {
        "run": config.run.name,
        "budget": found.budget,
        "chosen": row(found.chosen),
        "settings": (sizes or {}) | settings(found.chosen.choice),
        "candidates": [row(c) for c in found.candidates],
    }


def describe_choice(choice: Choice) -> str:
    """ "plan nothing, 4 micro-batches, 128 tokens of logits"."""
    chunk = "" if choice.mlp_chunk is None else f", {choice.mlp_chunk} tokens of the MLP"
    several = f", {choice.accumulation} micro-batches" if choice.accumulation > 1 else ""
    tile = "" if choice.loss_tile is None else f", {choice.loss_tile} tokens of logits"
    return f"plan {choice.plan}{several}{tile}{chunk}"


def in_bytes(n: float) -> str:
    """ "40.3 MB"."""
    if n < 1e6:
        return f"{n / 1e3:.0f} kB"
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
