"""Plans: what the backward pass of each run of layers finds kept.

    nothing     reverse: the streams are rebuilt from the last ones       memory flat in depth
    attention   reverse, but keep what f calls "attention" (its output and log-sum-exp), so that it is not
                computed again: nearly all of a step in a long context. f names a value by
                `jax.ad_checkpoint.checkpoint_name`; `Reverse(names)` keeps any others
    inputs(k)   keyframes: the streams at every k-th layer are kept, and the k layers between two of
                them are computed again (k = 1: what `jax.checkpoint` does)
    all         store every activation, as differentiation without `jax.checkpoint` does

A plan is a value: one word for all runs, or one for each. All plans give the same forward bits.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Reverse:
    """Rebuilds each layer's input by the inverse. Keeps what f has given one of these names (and the coupling's bits).

    Where nothing has such a name, `reversible_scan` raises a ValueError.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.names, str) or not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"names must be a tuple of strings, but got {self.names!r}.")
        object.__setattr__(self, "names", tuple(self.names))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Keeps the streams at every `every`-th layer, and computes the layers between again."""

    every: int = 1

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"The layers between two keyframes must be at least 1, but got every={self.every}.")


@dataclasses.dataclass(frozen=True)
class All:
    """Keeps every activation."""


Keep = Reverse | Inputs | All
Plan = str | Keep | Sequence[str | Keep]


def parse(keep: str | Keep) -> Keep:
    """Reads 'nothing', 'attention', 'inputs', 'inputs:4' or 'all'."""
    if isinstance(keep, Keep):
        return keep
    name, _, every = str(keep).partition(":")
    if name == "nothing" and not every:
        return Reverse()
    if name == "attention" and not every:
        return Reverse(("attention",))
    if name == "all" and not every:
        return All()
    if name == "inputs" and (not every or every.isdigit()):
        return Inputs(int(every or 1))
    raise ValueError(
        "A plan is 'nothing', 'attention', 'inputs', 'inputs:K' (K layers between keyframes) or 'all', but got "
        f"{keep!r}."
    )


def for_runs(plan: Plan, num_runs: int) -> tuple[Keep, ...]:
    """One answer to "what is kept" for each run."""
    if isinstance(plan, str | Reverse | Inputs | All):
        return (parse(plan),) * num_runs
    keeps = tuple(parse(keep) for keep in plan)
    if len(keeps) != num_runs:
        raise ValueError(
            f"The plan has {len(keeps)} entries for {num_runs} runs of layers; give one for each, or one word."
        )
    return keeps
