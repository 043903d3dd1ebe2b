"""The fastest plan that fits: what is kept for the backward pass, and how a batch is cut, for a number of bytes.

    search         candidates in the order of their predicted time; the first whose compiled step fits is chosen
    by_the_clock   of a few that fit the fastest by the clock is chosen
    largest        the other way round: how long a context, how many layers or rows a budget allows

Predictions say what to try and in which order; what is believed is the compiled program. What one program took says
how far predictions for its kind (the same plan) are off, so that few are compiled.

Nothing is known here of models or of training: candidates come with predictions, `measure` compiles, `clock` runs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence


@dataclasses.dataclass(frozen=True, order=True)
class Choice:
    """All that a planner may choose of a training step.

    Attributes:
      plan: what the backward pass finds kept, see `revjax.core.plan`.
      accumulation: micro-batches that a batch is cut into.
      loss_tile: tokens that have logits at one time; None where all have.
      mlp_chunk: tokens of a row that have a hidden layer of the MLP at one time; None is all.
    """

    plan: str
    accumulation: int
    loss_tile: int | None
    mlp_chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A choice, and what is known of it.

    Attributes:
      time: of a step, predicted, in any unit.
      predicted: bytes of everything on one device.
      measured: the same, of the compiled step; None where it was not compiled.
      seconds: of a step, by the clock; None where none was taken.
    """

    choice: Choice
    time: float
    predicted: int
    measured: int | None = None
    seconds: float | None = None

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
      candidates: those whose plans differ in numbers only are of one kind.
      measure: compiles a choice and returns its bytes.
      slack: how far a prediction may lie above the budget and its candidate still be tried.
    """
    known = {c.choice: c for c in sorted(candidates, key=lambda c: (c.time, c.predicted))}
    off: dict[str, float] = {}  # measured over predicted, by kind of plan
    for candidate in Found(None, tuple(known.values()), budget).frontier():
        kind = re.sub(r"\d+ ?", "", candidate.choice.plan)
        if candidate.predicted * off.get(kind, 1 / (1 + slack)) > budget:
            continue
        measured = measure(candidate.choice)
        off[kind] = measured / candidate.predicted
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


def by_the_clock(
    found: Found,
    measure: Callable[[Choice], int],
    clock: Callable[[list[Choice]], list[float]],
    *,
    slower: float = 0.3,
    slack: float = 0.15,
) -> Found:
    """Returns `found` with another choice where the clock says so.

    What counting sees least is how micro-batches run (caches, fresh memory, the start of each operation), so of each
    number of them the candidate is timed that is predicted to be the fastest that fits.

    Args:
      found: of `search`, with something chosen.
      measure: as of `search`.
      clock: takes steps of choices, and returns the seconds that one of each takes.
      slower: candidates predicted to be slower than the chosen one by more than this part are left out.
    """
    assert found.chosen is not None
    known = {c.choice: c for c in found.candidates}
    finalists = [found.chosen]
    for accumulation in sorted({choice.accumulation for choice in known} - {found.chosen.choice.accumulation}):
        may_fit = [
            c
            for c in known.values()
            if c.choice.accumulation == accumulation
            and c.time <= (1 + slower) * found.chosen.time
            and c.bytes <= (1 + slack) * found.budget
        ]
        if not may_fit:
            continue
        of_these = search(may_fit, found.budget, measure, slack=slack)
        known |= {c.choice: c for c in of_these.candidates}
        if of_these.chosen is not None:
            finalists.append(of_these.chosen)
    seconds = clock([c.choice for c in finalists])
    timed = [dataclasses.replace(c, seconds=s) for c, s in zip(finalists, seconds, strict=True)]
    known |= {c.choice: c for c in timed}
    fastest = min(timed, key=lambda c: c.seconds or 0.0)
    return Found(fastest, tuple(known.values()), found.budget)


def largest(bytes_of: Callable[[int], int], budget: int, *, start: int, unit: int = 1) -> tuple[int, int] | None:
    """Returns the largest size whose step fits a budget, to a part in 32, and the bytes of that step; or None.

    Args:
      bytes_of: compiles the step of a size and returns its bytes, which grow with the size, nearly on a line.
      start: a size to begin with.
      unit: sizes are multiples of it.
    """
    known: dict[int, int] = {}
    size = max(start // unit, 1)
    while True:
        known[size] = bytes_of(size * unit)
        fits = max((n for n, needed in known.items() if needed <= budget), default=0)
        fails = min((n for n, needed in known.items() if needed > budget), default=None)
        near = max(fits // 32, 1)
        if fails is not None and fails - fits <= near:
            return (fits * unit, known[fits]) if fits else None
        highest = 8 * fits if fails is None else fails - 1
        guess = _on_the_line(known, budget)
        if fails is not None and len(known) % 3 == 0:  # a line alone may come closer from one side only
            guess = math.isqrt(max(fits, 1) * fails)
        size = min(max(guess, fits + near), highest)


def _on_the_line(known: dict[int, int], budget: int) -> int:
    """The size at which a line through the two nearest known ones meets the budget."""
    (n, needed), *more = sorted(known.items(), key=lambda x: abs(x[1] - budget))
    other, needed_there = more[0] if more else (0, 0)
    slope = (needed - needed_there) / (n - other)
    return n + int((budget - needed) // slope) if slope > 0 else n


def knee(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of a frontier that lies furthest below the line between its ends, both axes from 0 to 1."""
    low, high = min(c.bytes for c in candidates), max(c.bytes for c in candidates)
    fast, slow = min(c.time for c in candidates), max(c.time for c in candidates)
    scaled = lambda x, a, b: (x - a) / (b - a) if b > a else 0.0
    return min(candidates, key=lambda c: scaled(c.bytes, low, high) + scaled(c.time, fast, slow))
