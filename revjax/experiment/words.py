"""What a run says of itself before and after."""

import statistics
from typing import Any

import jax

from ..data import Corpus, Images, Text
from ..logging import get_logger
from ..memory import ELSEWHERE, LOOPS, GPUUse, OpTimes, Timeline, activation_memory
from ..models import flops_per_token, num_params
from ..training import TrainState, describe_evaluation, read_metrics
from .build import Experiment
from .run import Result
from .versions import versions


def announce(experiment: Experiment) -> str:
    """What the run is about to do and what it costs, in a few lines. Compiles for the memory figures (seconds)."""
    config, corpus, start = experiment.config, experiment.corpus, experiment.start_step
    model, data, steps = config.model, config.data, config.training.steps
    tokens = (steps - start) * config.tokens_per_step
    flops = tokens * flops_per_token(model, config.row_length)
    rows = data.batch_size // config.memory.accumulation // experiment.devices.count
    get_logger(__name__).info("compiling its gradient in three ways, for the memory figures")
    needed = activation_memory(model, rows, config.row_length, plan=config.memory.plan)
    each = " on each device" if experiment.devices.count > 1 else ""
    reversible, checkpoint, stored = (_bytes(needed[how]) for how in ("reversible", "checkpoint", "stored"))
    going_on = f" from step {start}" if start else ""
    device = jax.devices()[0]
    lines = {
        "run": f"{config.run.name}{going_on}, on {_devices(experiment)} {device.device_kind} ({device.platform})",
        "versions": versions(),
        "model": f"{num_params(experiment.skeleton.abstract):,} parameters{_trained(experiment)}: "
        f"{model.num_layers} layers, d_model {model.d_model}, {model.num_heads} heads, {model.dtype}",
        "text" if isinstance(corpus, Corpus) else "images": _data(corpus),
        "training": f"{steps - start:,} steps of {data.batch_size} x {config.row_length} tokens: {tokens:,} tokens, "
        f"{_number((steps - start) * data.batch_size / experiment.batches.rows_per_epoch)} epochs, "
        f"{flops:.2g} floating-point operations"
        if start < steps
        else f"nothing is left to do at step {start:,}. For more: --training.steps={2 * start} "
        "--allow-change=training.steps",
        "state": _state_bytes(experiment.state),
        "activations": f"{reversible}{each} with coupling {model.coupling} and plan {config.memory.plan}; "
        f"{checkpoint} with jax.checkpoint, {stored} stored",
        "": "(temporary bytes of the gradient, counted by XLA)",
        "step": f"{_bytes(experiment.train_step.memory_analysis().temp_size_in_bytes)} of temporary bytes{each} in "
        "all, with the optimizer's",
        "results": f"{experiment.folder.path}/",
    }
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def _trained(experiment: Experiment) -> str:
    lora, model = experiment.config.model.lora, experiment.skeleton.abstract
    return "" if lora is None else f", of which {num_params(model, trained_only=True):,} of adapters are trained"


def _devices(experiment: Experiment) -> str:
    mesh = experiment.devices.mesh
    return "1 x" if mesh is None else f"{mesh.size} (data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']}) x"


def _data(corpus: Corpus | Images) -> str:
    if isinstance(corpus, Images):
        size = corpus.train.size
        return (
            f"{corpus.source}: {len(corpus.train):,} of {len(corpus.classes)} classes, {size} x {size} x "
            f"{corpus.train.channels}; held out: {len(corpus.held_out):,}"
        )
    several = len(corpus.train) > 1
    shares = {part.name: f"{part.weight:.0%} " if several else "" for part in corpus.train}
    lines = [f"{shares[part.name]}{part.name}: {_size(part.text)}" for part in corpus.train]
    held_out = {part.name: part.text for part in corpus.validation if part.weight and part.name in shares}
    if held_out:
        lines.append("held out: " + ", ".join(_size(text) for text in held_out.values()))
    others = [part for part in corpus.validation if part.name not in held_out]
    lines += [f"evaluated as {part.name}: {_size(part.text)}" for part in others]
    return ("\n" + " " * 13).join(lines)


def _size(text: Text) -> str:
    documents = "1 document" if text.num_documents == 1 else f"{text.num_documents:,} documents"
    return f"{text.num_tokens:,} tokens of {documents}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}"


def _state_bytes(state: TrainState) -> str:
    parts = {"parameters": state.params, "frozen": state.frozen}
    parts |= {"optimizer": state.opt_state, "running mean": state.ema}
    sizes = {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for name, part in parts.items()}
    return ", ".join(f"{name} {_bytes(size)}" for name, size in sizes.items() if size)


def describe_memory(experiment: Experiment, found: Timeline) -> str:
    """Where the memory of a training step goes at its highest point."""
    config, at = experiment.config, found.peak()
    live = found.live(at)
    top = sum(buffer.bytes for buffer in live)
    loop = next((f", in the {loop.name} loop" for loop in found.loops if loop.start <= at <= loop.end), "")
    shares = sorted(found.by_category(at).items(), key=lambda item: -item[1])
    model, data = config.model, config.data
    lines = {
        "step": f"{config.run.name}, on {_devices(experiment)} {jax.devices()[0].device_kind}",
        "versions": versions(),
        "model": f"{model.num_layers} layers, d_model {model.d_model}, {model.dtype}, coupling {model.coupling}, plan "
        f"{config.memory.plan}; {data.batch_size} x {config.row_length} tokens",
        "always": _state_bytes(experiment.state),
        "temporary": f"{_bytes(top)} at the highest point{loop}; XLA reserves {_bytes(found.temp_bytes)}",
        "of these": [f"{_bytes(n):>10}  {n / max(top, 1):4.0%}  {name}" for name, n in shares if n > 0.005 * top],
        "largest": [f"{_bytes(b.bytes):>10}  {b.shape:<22} {b.category:<10} {b.line}" for b in live[:12]],
    }
    return _lines(lines)


def describe_time(times: OpTimes) -> str:
    """Where the time of a training step goes: by what it is for and by loop, and its longest operations."""
    sums = times.by_category()
    whole = sum(operation.seconds for operation in times.operations)
    loops = [name for name in (*LOOPS, ELSEWHERE) if any(name in by_loop for by_loop in sums.values())]
    total = lambda by_loop: sum(by_loop.values())
    rows = [["", *loops, "all", ""]]
    for name, by_loop in sorted(sums.items(), key=lambda item: -total(item[1])):
        cells = [f"{1e3 * by_loop[loop]:.1f}" if loop in by_loop else "-" for loop in loops]
        rows.append([name, *cells, f"{1e3 * total(by_loop):.1f}", f"{total(by_loop) / whole:.0%}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    longest = [
        f"{1e3 * o.seconds:>8.1f} ms  {o.seconds / whole:4.0%}  {o.calls:>7,.0f} x  {o.category:<10} {o.line}"
        for o in times.operations[:12]
    ]
    lines = {
        "time": f"{1e3 * statistics.median(times.steps):.1f} ms a step (median of {len(times.steps)}, watched); its "
        f"operations {1e3 * whole:.1f} ms",
        "of these, ms": table,
        "longest": longest,
    }
    return _lines(lines)


def describe_gpu_use(found: list[GPUUse] | str, tokens: int) -> str:
    """Power and energy of steps of so many tokens, a line for each device; or why they are not known."""
    if isinstance(found, str):
        return _lines({"power": f"not known: {found}"})
    one = lambda use: (
        f"{use.watts:,.0f} W, {use.step_joules:,.3g} J a step, {1e3 * use.step_joules / tokens:,.3g} mJ a token; "
        f"kernels ran {use.utilization:.0%} of the time; {_bytes(use.memory_bytes)} in use ({use.name}, {use.steps:,} "
        f"steps of {1e3 * use.step_seconds:,.1f} ms)"
    )
    return _lines({"power": [one(use) for use in found]})


def summarize(result: Result) -> str:
    """What a run has come to, in a few lines."""
    outcome, folder = result.outcome, result.folder
    step = int(outcome.state.step)
    already = "" if step > result.start_step else "was "
    ended = {
        "finished": f"{already}finished at step {step:,}",
        "interrupted": f"interrupted after step {step:,}; the same command continues from there",
        "stopped": f"stopped at step {step:,}, because of a gradient that is not to be trusted (see above)",
    }[outcome.ended]
    skipped = int(outcome.state.skipped)
    metrics = read_metrics(folder / "metrics.jsonl")
    lines = {
        "BROKEN": _broken(metrics) if result.is_broken else "",
        "run": ended + (f", {skipped} updates left out" if skipped else ""),
        "took": f"{result.seconds:.0f} s, from the first step on",
        "exactness": _exactness(metrics),
        "held out": _first_to_last(read_metrics(folder / "validation.jsonl")),
        "results": f"{folder}/: checkpoints/, metrics.jsonl, validation.jsonl, loss.png"
        + (", sample.txt" if result.sample else ""),
    }
    text = "\n".join(f"{name:<12} {line}" for name, line in lines.items() if line)
    if result.sample:
        text += f"\n\nA sample:\n\n{result.sample}\n\n"
        text += (
            f"On: python scripts/generate.py {folder} --prompt='class '\n"
            f"    python scripts/evaluate.py {folder}   # on all of the held-out text"
        )
    return text


def _broken(lines: list[dict[str, Any]]) -> str:
    """Since when the loss of training is no number, and what to do."""
    last_good = max((line["step"] for line in lines if line["loss"] is not None), default=0)
    since = [line["step"] for line in lines if line["step"] > last_good]
    when = f"since step {since[0]:,}, its loss" if since else "its loss on held-out text, or a parameter,"
    return (
        f"the model is of no use: {when} is no number.\n{'':<12} Train again, with another --run.name, and with "
        "--training.on_trouble=rewind or a lower --optimizer.learning_rate."
    )


def _exactness(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    wrong = [line["step"] for line in lines if line["canary"] or line["unsafe"]]
    if not wrong:
        return f"every stream was rebuilt to the bit, at each of {len(lines):,} steps (canary 0, unsafe 0)"
    rows, elements = (sum(line[name] for line in lines) for name in ("canary", "unsafe"))
    return f"canary {rows:,}, unsafe {elements:,}, at {len(wrong):,} of {len(lines):,} steps, first at {wrong[0]:,}"


def _first_to_last(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    first, last = (f"{describe_evaluation(line, 3)} at step {line['step']:,}" for line in (lines[0], lines[-1]))
    return first if lines[0] is lines[-1] else f"{first}, {last.replace(' bits/byte', '').replace(' nats', '')}"


def _lines(lines: dict[str, str | list[str]]) -> str:
    """Each name before its text, or before the first of several."""
    whole = {name: [text] if isinstance(text, str) else text for name, text in lines.items()}
    return "\n".join(
        f"{name if i == 0 else '':<12} {text}" for name, texts in whole.items() for i, text in enumerate(texts)
    )


def _bytes(n: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"
