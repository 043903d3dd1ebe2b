"""A study of quality: runs that differ in a few settings, on the same data in the same order, by paired seeds.

A seed decides the parameters, the batches and dropout. So two variants with one seed begin with the same weights (where
their shapes agree) and see the same tokens, and their difference says more than their losses do:

    difference = 100 (loss - loss of the baseline) / loss of the baseline, of one seed        mean +- t s / sqrt(n)
"""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from scipy import stats

from ..config import load
from ..core import parse_coupling
from ..errors import ConfigError, nearest
from ..experiment import RunConfig, build, run
from ..logging import get_logger
from ..training import headline, read_metrics, unit_of

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is compared."""

    results: str  # the .jsonl file of all that was measured; its plot is beside it
    runs: tuple[str, ...]  # files with the settings that all runs share
    variants: dict[str, dict[str, Any]]  # by name, the settings in which each differs, such as {model.coupling: revnet}
    baseline: str  # the variant that the others are compared with
    seeds: tuple[int, ...] = (0,)
    folder: str = "runs/studies"  # of the runs themselves; what is finished is deleted

    def __post_init__(self):
        if self.baseline not in self.variants:
            raise ConfigError(
                f"baseline: there is no variant {self.baseline!r}.{nearest(self.baseline, self.variants)}"
            )
        if len(set(self.seeds)) < max(len(self.seeds), 1):
            raise ConfigError(f"seeds must be different numbers, at least one, but got {list(self.seeds)}.")

    def run_config(self, variant: str, seed: int) -> RunConfig:
        """The run of one variant with one seed."""
        name = re.sub(r"[^\w.]+", "-", f"{pathlib.Path(self.results).stem} {variant} {seed}")
        given = {**self.variants[variant], "training.seed": seed, "run.name": name}
        given |= {"run.folder": self.folder, "training.sample_prompt": ""}
        return load(RunConfig, self.runs, [f"--{name}={_word(x)}" for name, x in given.items()], environ={})


def _word(x: Any) -> str:
    return "null" if x is None else str(x).lower() if isinstance(x, bool) else str(x)


def compare(config: StudyConfig, *, measure: bool = True) -> Iterator[Row]:
    """Yields a row for each seed and variant; those in `config.results` are read, and with `measure` the others made.

    Seeds come first: after each, all variants can be compared. A run that is interrupted ends the study, and goes on
    where it was when the study is started again.
    """
    path = pathlib.Path(config.results)
    if measure:
        try:  # before an hour is spent
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as e:
            raise ConfigError(f"Cannot write to {path} (results): {e.strerror}.") from None
    known = {(row["variant"], row["seed"], row["settings"]): row for row in read_metrics(path)}
    runs = {(v, seed): config.run_config(v, seed) for seed in config.seeds for v in config.variants}  # or a mistake
    for i, ((variant, seed), run_config) in enumerate(runs.items(), 1):
        row = known.get((variant, seed, fingerprint(run_config)))
        if row is None and measure:
            get_logger(__name__).info("run %d of %d: %s, seed %d", i, len(runs), variant, seed)
            row = _measure(variant, seed, run_config)
            if row is None:
                return
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            shutil.rmtree(run_config.run.path)
        if row is not None:
            yield row


def fingerprint(config: RunConfig) -> str:
    """A hash of every setting that changes what a run computes.

    What is null does nothing, and is left out: so a result stays that of its run when revjax learns more settings. So
    is what was all that there was.
    """
    settings = _without_null(dataclasses.asdict(config))
    del settings["run"]
    settings["model"]["readout"] = config.model.resolved_readout  # whatever "auto" means by now
    for section, name, only in (
        ("model", "family", "decoder"),
        ("model", "norm_placement", "pre"),
        ("data", "kind", "text"),
    ):
        if settings[section].get(name) == only:
            del settings[section][name]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _without_null(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: _without_null(x) for name, x in settings.items() if x is not None}


def _measure(variant: str, seed: int, config: RunConfig) -> Row | None:
    """Trains one run; returns what it came to, or None where it was interrupted."""
    ready = build(config)
    memory = ready.train_step.memory_analysis().temp_size_in_bytes
    result = run(ready)
    if result.outcome.ended != "finished":
        return None
    steps, held_out = (read_metrics(result.folder / f"{name}.jsonl") for name in ("metrics", "validation"))
    tokens = lambda line: line["step"] * config.tokens_per_step
    shown = [name for name in ("bits_per_byte", "loss", "accuracy") if name in held_out[-1]]
    return {
        "variant": variant,
        "seed": seed,
        "settings": fingerprint(config),
        "coupling": config.model.coupling,
        "kept_bits": kept_bits(config),
        "step_bytes": memory,
        "tokens": tokens(held_out[-1]),
        **{name: held_out[-1][name] for name in shown},
        "curve": [[tokens(line), headline(line)] for line in held_out],
        "canary": sum(line["canary"] for line in steps),
        "unsafe": sum(line["unsafe"] for line in steps),
        "max_abs": max((line["max_abs"] or math.inf) for line in steps),
        "skipped": steps[-1]["skipped"],
        "step_s": statistics.median(config.tokens_per_step / line["tokens_per_second"] for line in steps),
    }


def kept_bits(config: RunConfig) -> float:
    """Bits for each element of a stream and f that the backward pass finds: kept bits, or what `inputs` keeps."""
    coupling = parse_coupling(config.model.coupling)
    fns = 1 if config.model.granularity == "block" else 2
    return float(coupling.kept_bits) if coupling.reversible else 32 / fns


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One variant beside the baseline."""

    variant: str
    rows: list[Row]
    loss: float  # bits per byte of text, or nats: the mean of its seeds
    difference: float  # per cent, the mean of the seeds that both have
    half_width: float  # of the difference's 95 % interval; infinite for one seed

    def describe(self) -> list[str]:
        """Its cells in `table`."""
        most = lambda name: max(row[name] for row in self.rows)
        within = "" if self.half_width in (0, math.inf) else f" ± {self.half_width:.2f}"
        step_s = statistics.median(row["step_s"] for row in self.rows)
        right = [100 * row["accuracy"] for row in self.rows if "accuracy" in row]
        return [
            self.variant,
            f"{most('kept_bits'):g}",
            f"{len(self.rows)}",
            f"{self.loss:.4f}",
            f"{self.difference:+.2f}{within}",
            *([f"{statistics.fmean(right):.2f}"] if right else []),
            f"{most('step_bytes') / 1e6:.1f}",
            f"{1e3 * step_s:.0f}",
            f"{sum(row['canary'] + row['unsafe'] for row in self.rows)}",
            f"{most('max_abs'):.0f}",
        ]


def summarize(rows: Sequence[Row], baseline: str) -> list[Comparison]:
    """A comparison for each variant, in the order of the rows."""
    by_variant: dict[str, dict[int, Row]] = collections.defaultdict(dict)
    for row in rows:
        by_variant[row["variant"]][row["seed"]] = row
    found = []
    for variant, seeds in by_variant.items():
        pairs = [(row, by_variant[baseline][seed]) for seed, row in seeds.items() if seed in by_variant[baseline]]
        differences = [100 * (_loss(a) / _loss(b) - 1) for a, b in pairs]
        mean = statistics.fmean(differences) if differences else math.nan
        loss = statistics.fmean(map(_loss, seeds.values()))
        found.append(Comparison(variant, list(seeds.values()), loss, mean, half_width(differences)))
    return found


def _loss(row: Row) -> float:
    loss = headline(row)
    return math.nan if loss is None else loss  # as metrics write what is no number


def half_width(samples: Sequence[float]) -> float:
    """Of the 95 % interval of their mean (Student's t); infinite for fewer than two."""
    if len(samples) < 2:
        return math.inf
    return float(stats.t.ppf(0.975, len(samples) - 1)) * statistics.stdev(samples) / math.sqrt(len(samples))


def table(comparisons: Sequence[Comparison]) -> str:
    """In Markdown: a line for each variant."""
    rows = [row for comparison in comparisons for row in comparison.rows]
    accuracy = ["% right"] if all("accuracy" in row for row in rows) else []
    costs = ["step MB", "step ms", "canary, unsafe", "max |x|"]
    head = ["variant", "kept bits", "seeds", unit_of(rows), "% above", *accuracy, *costs]
    cells = [head, *(c.describe() for c in comparisons)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    pad = lambda row: [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]
    lines = [f"| {' | '.join(pad(row))} |" for row in cells]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
