"""Plans: what the backward pass of each run of layers finds kept.

    nothing     reverse: the streams are rebuilt from the last ones       memory flat in depth
    attention   reverse, but keep what f calls "attention" (its output and log-sum-exp), so that it is not
                computed again: nearly all of a step in a long context. f names a value by
                `jax.ad_checkpoint.checkpoint_name`; `Reverse(names)` keeps any others
    inputs(k)   keyframes: the streams at every k-th layer are kept, and the k layers between two of
                them are computed again (k = 1: what `jax.checkpoint` does)
    host(k)     the same, with the keyframes in the host's memory; not on a CPU, which has no other
    all         store every activation, as differentiation without `jax.checkpoint` does

A plan is a value: one word for all runs, or one for each. A run may have several, each for a part of its layers, first
layers first: "40 nothing, 8 all". All plans give the same forward bits.
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
    """Keeps the streams at every `every`-th layer, on the host if `host`, and computes the layers between again."""

    every: int = 1
    host: bool = False

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"The layers between two keyframes must be at least 1, but got every={self.every}.")


@dataclasses.dataclass(frozen=True)
class All:
    """Keeps every activation."""


Keep = Reverse | Inputs | All


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is kept for each part of a run: (repeats, keep), first repeats first. One may say None: those that remain.

    What is kept of the last layers is free again first, so the parts that keep most belong there.
    """

    parts: tuple[tuple[int | None, Keep], ...]

    def __post_init__(self):
        counts = [count for count, _ in self.parts]
        if not counts or counts.count(None) > 1 or any(count is not None and count < 1 for count in counts):
            raise ValueError(
                "Each part of a plan needs a number of layers of at least 1, but for one that takes those that remain "
                f"('nothing, 8 all'), but got {str(self)!r}."
            )

    def __str__(self) -> str:
        return ", ".join(" ".join(map(str, (n, word(k)) if n else (word(k),))) for n, k in self.parts)

    def of(self, length: int) -> tuple[tuple[int, Keep], ...]:
        """The same for a run of so many repeats, with every number said."""
        said = sum(count or 0 for count, _ in self.parts)
        rest = any(count is None for count, _ in self.parts)
        if said > length or (said < length and not rest):
            raise ValueError(f"The plan '{self}' is for {said} layers, but there are {length}.")
        found = [(length - said if count is None else count, keep) for count, keep in self.parts]
        return tuple((count, keep) for count, keep in found if count)


Plan = str | Keep | Parts | Sequence[str | Keep | Parts]


def parse(keep: str | Keep | Parts) -> Keep | Parts:
    """Reads 'nothing', 'attention', 'inputs', 'inputs:4', 'host:4', 'all', or several: '40 nothing, 8 all'."""
    if isinstance(keep, Keep | Parts):
        return keep
    if isinstance(keep, str) and ("," in keep or keep.strip()[:1].isdigit()):
        return Parts(tuple(_part(part) for part in keep.split(",")))
    return _keep(keep)


def word(keep: Keep) -> str:
    """What `parse` reads as this; of names that have no word, the value itself."""
    if isinstance(keep, Reverse):
        return {(): "nothing", ("attention",): "attention"}.get(keep.names, repr(keep))
    if isinstance(keep, All):
        return "all"
    name = "host" if keep.host else "inputs"
    return name if keep.every == 1 else f"{name}:{keep.every}"


def _part(text: str) -> tuple[int | None, Keep]:
    count, _, name = text.strip().rpartition(" ")
    if count and not count.isdigit():
        raise ValueError(f"A part of a plan is a number of layers and a word, '8 all', but got {text.strip()!r}.")
    return (int(count) if count else None), _keep(name)


def _keep(keep: str) -> Keep:
    name, _, every = str(keep).partition(":")
    if name == "nothing" and not every:
        return Reverse()
    if name == "attention" and not every:
        return Reverse(("attention",))
    if name == "all" and not every:
        return All()
    if name in ("inputs", "host") and (not every or every.isdigit()):
        return Inputs(int(every or 1), host=name == "host")
    raise ValueError(
        "A plan is 'nothing', 'attention', 'inputs', 'inputs:K' (K layers between keyframes), 'host', 'host:K' (these "
        "in the host's memory) or 'all', or several with numbers of layers ('40 nothing, 8 all'), but got "
        f"{keep!r}."
    )


def for_runs(plan: Plan, lengths: Sequence[int]) -> tuple[tuple[tuple[int, Keep], ...], ...]:
    """What is kept of each run of so many repeats: for each of its parts, first repeats first, how many and what."""
    if not isinstance(plan, Sequence) or isinstance(plan, str):
        plan = (plan,) * len(lengths)
    if len(plan) != len(lengths):
        raise ValueError(
            f"The plan has {len(plan)} entries for {len(lengths)} runs of layers; give one for each, or one word."
        )
    keeps = [parse(keep) for keep in plan]
    return tuple(
        keep.of(length) if isinstance(keep, Parts) else ((length, keep),)
        for keep, length in zip(keeps, lengths, strict=True)
    )


def keeps(plan: Plan, lengths: Sequence[int]) -> set[Keep]:
    """All that `for_runs` answers."""
    return {keep for parts in for_runs(plan, lengths) for _, keep in parts}
