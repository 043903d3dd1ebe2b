"""The fastest plan that fits: what is kept for the backward pass, and how a batch is cut, for a number of bytes.

    search   candidates in the order of their predicted time; the first whose compiled step fits is chosen

Predictions say what to try and in which order; what is believed is the compiled program. What one program took says
how far predictions for its kind (the same plan) are off, so that few are compiled.

Nothing is known here of models or of training: candidates come with predictions, and `measure` compiles.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{binary}B": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kMGT", start=1)
    for binary in ("", "i")
}


@dataclasses.dataclass(frozen=True, order=True)
class Choice:
    """All that a planner may choose of a training step.

    Attributes:
      plan: what the backward pass finds kept, see `revjax.core.plan`.
      accumulation: micro-batches that a batch is cut into.
      loss_tile: tokens that have logits at one time.
      mlp_chunk: tokens of a row that have a hidden layer of the MLP at one time; None is all.
    """

    plan: str
    accumulation: int
    loss_tile: int
    mlp_chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A choice, and what is known of it.

    Attributes:
      time: of a step, predicted, in any unit.
      predicted: bytes of everything on one device.
      measured: the same, of the compiled step; None where it was not compiled.
    """

    choice: Choice
    time: float
    predicted: int
    measured: int | None = None

    @property
    def bytes(self) -> int:
        """What is known best."""
        return self.predicted if self.measured is None else self.measured


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to: `chosen` (None where nothing fits), and all candidates, fastest first."""

    chosen: Candidate | None
    candidates: tuple[Candidate, ...]
    budget: int

    def frontier(self) -> list[Candidate]:
        """The candidates that no other one beats in both time and bytes, fastest first."""
        best: list[Candidate] = []
        for candidate in sorted(self.candidates, key=lambda c: (c.time, c.bytes)):
            if not best or candidate.bytes < best[-1].bytes:
                best.append(candidate)
        return best


def search(
    candidates: Iterable[Candidate], budget: int, measure: Callable[[Choice], int], *, slack: float = 0.15
) -> Found:
    """Returns the fastest candidate whose measured bytes are at most `budget`.

    Tried are those that by prediction no other one beats in both time and bytes; one that fits though its prediction,
    or another of its plan, said otherwise is not found.

    Args:
      measure: compiles a choice and returns its bytes.
      slack: how far a prediction may lie above the budget and its candidate still be tried.
    """
    known = {c.choice: c for c in sorted(candidates, key=lambda c: (c.time, c.predicted))}
    off: dict[str, float] = {}  # measured over predicted, by plan
    for candidate in Found(None, tuple(known.values()), budget).frontier():
        plan = candidate.choice.plan
        if candidate.predicted * off.get(plan, 1 / (1 + slack)) > budget:
            continue
        measured = measure(candidate.choice)
        off[plan] = measured / candidate.predicted
        known[candidate.choice] = dataclasses.replace(candidate, measured=measured)
        if measured <= budget:
            return Found(known[candidate.choice], tuple(known.values()), budget)
    least = min(known.values(), key=lambda c: c.predicted)
    if least.measured is None:  # it may fit all the same; if not, its bytes are the smallest budget that works
        measured = measure(least.choice)
        known[least.choice] = dataclasses.replace(least, measured=measured)
    least = known[least.choice]
    chosen = least if least.bytes <= budget else None
    return Found(chosen, tuple(known.values()), budget)


def parse_bytes(text: str) -> int:
    """Reads "40GiB", "8 GB", "500MB", "1e9".

    Raises `ValueError` for a unit that is not one, and for what is not above 0.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    try:
        number, unit = float(match[1]), match[2]  # pyright: ignore[reportOptionalSubscript]
        found = number * units[unit.lower()]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"Bytes are written as 40GiB, 8GB, 500MB or 1e9, but got {text!r}.") from None
    if not 0 < found < math.inf:
        raise ValueError(f"Bytes must be above 0, but got {text!r}.")
    return int(found)


def knee(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of a frontier that lies furthest below the line between its ends, both axes from 0 to 1."""
    low, high = min(c.bytes for c in candidates), max(c.bytes for c in candidates)
    fast, slow = min(c.time for c in candidates), max(c.time for c in candidates)
    scaled = lambda x, a, b: (x - a) / (b - a) if b > a else 0.0
    return min(candidates, key=lambda c: scaled(c.bytes, low, high) + scaled(c.time, fast, slow))
