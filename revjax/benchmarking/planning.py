"""How good the planner's choices are: a few steps of a run compiled and timed, and what it would have chosen.

    regret(budget) = time of the chosen step / time of the fastest that fits - 1

Times are of one run of turns (see `speed.paired`), so that only their ratios count. Regret "by the clock" is what
remains where the planner may time a few (`plan --time`); as it reads the same times, it leaves out their noise.
"""

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from ..data import DataConfig
from ..experiment import Devices, Program, RunConfig, bytes_of_step, candidates, stepper, with_choice
from ..logging import get_logger
from ..memory import Candidate, Choice, Found, by_the_clock, search
from ..sharding import MeshConfig
from .memory import MemoryConfig
from .speed import paired


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningConfig(MemoryConfig):
    """One run whose step is planned."""

    steps: int = 12
    budgets: int = 20
    pairs: int = 3

    def run(self) -> RunConfig:
        data = DataConfig(batch_size=self.batch_size, sequence_length=self.sequence_length)
        return RunConfig(model=self.decoder(), data=data, mesh=MeshConfig(data=1))


def planning(config: PlanningConfig, *, seed: int = 0) -> dict[str, Any]:
    """Measures steps that a planner may choose, and its regret over budgets between the least and the most bytes."""
    run = config.run()
    chosen = _some(list(candidates(run)), config.steps, seed)
    base = _step(run, chosen[0].choice, seed)
    measured: dict[Choice, tuple[int, float]] = {}
    for i, candidate in enumerate(chosen):
        get_logger(__name__).info("step %d of %d", i + 1, len(chosen))
        needed, step = _step(run, candidate.choice, seed)
        _, ratios = paired(step, base[1], config.pairs)
        measured[candidate.choice] = needed, float(np.median(ratios))
    bytes_of = {choice: needed for choice, (needed, _) in measured.items()}
    budgets = np.geomspace(min(bytes_of.values()), max(bytes_of.values()), config.budgets).astype(int)
    regrets, regrets_by_the_clock, compiled, timed = [], [], [], []
    for budget in budgets:
        tried: list[Choice] = []
        found = search(chosen, int(budget), lambda choice, tried=tried: tried.append(choice) or bytes_of[choice])
        compiled.append(len(tried))
        clocked = by_the_clock(found, bytes_of.__getitem__, lambda choices: [measured[c][1] for c in choices])
        timed.append(sum(c.seconds is not None for c in clocked.candidates))
        best = min(time for needed, time in measured.values() if needed <= budget)
        for result, into in ((found, regrets), (clocked, regrets_by_the_clock)):
            assert result.chosen is not None and bytes_of[result.chosen.choice] <= budget
            into.append(measured[result.chosen.choice][1] / best - 1)
    return {
        "worst_regret": max(regrets),
        "mean_regret": float(np.mean(regrets)),
        "most_compiled": max(compiled),
        "worst_regret_by_the_clock": max(regrets_by_the_clock),
        "mean_regret_by_the_clock": float(np.mean(regrets_by_the_clock)),
        "most_timed": max(timed),
        "steps": [
            dataclasses.asdict(c.choice)
            | {"predicted": c.predicted, "bytes": measured[c.choice][0]}
            | {"predicted_time": c.time / chosen[0].time, "time": measured[c.choice][1]}
            for c in chosen
        ],
    }


def _some(all_of_them: list[Candidate], n: int, seed: int) -> list[Candidate]:
    """Those that no other one is predicted to beat, and others at random."""
    frontier = Found(None, tuple(all_of_them), 0).frontier()
    while len(frontier) > 2 * n // 3:
        del frontier[len(frontier) // 2 :: 2]
    others = sorted((c for c in all_of_them if c not in frontier), key=lambda c: c.choice.plan)
    random.Random(seed).shuffle(others)
    return [*frontier, *others[: n - len(frontier)]]


def _step(run: RunConfig, choice: Choice, seed: int) -> tuple[int, Callable[[], None]]:
    """Bytes of a step as compiled, and a function that takes one, on random tokens."""
    run = with_choice(run, choice)
    program = Program.of(run, Devices.of(run))
    compiled = program.compile()
    return bytes_of_step(compiled), functools.partial(stepper(run, program, seed), compiled)
