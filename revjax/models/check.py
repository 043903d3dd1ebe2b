"""`check`: may this block stand in a reversible stack? Run it before trusting a residual function of your own.

    rebuilt        rows of each layer's stream that the backward pass did not rebuild to the bit: must be 0
    unsafe         elements that were not finite, or did not fit the integers: must be 0
    gradients      against the stored run of the same rounded network: equal, up to the order of sums
    differences    the gradient along one direction, and for each array of parameters along one of its own, against
                   finite differences, in float64 on float streams

It looks for the usual faults as well, and names them: randomness that is not replayed, a variable that is
written to, a function that is not the same twice, a block that returns x + f(x) instead of f(x), and
products in low precision whose roundings XLA leaves out in one of two programs (which `pin` mends).
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..core.pin import pin
from ..logging import get_logger
from .differences import check_against_differences, listed, low_precision, name_of
from .gradients import stacks_of, value_and_grad
from .stack import MutatedVariableError, ReversibleStack, branch_function, keywords_of

PyTree = Any
TOLERANCE, LOW_TOLERANCE = 1e-5, 3e-2  # relative, of gradients: fp32 sums in another order; bf16 backward passes


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What `check` found: `ok`, the `faults` in words, and a row for each f. Printing it shows a table.

    Attributes:
      faults: what is wrong, and what to do; empty if nothing is.
      notes: what was not checked and why, or is worth knowing.
      rows: for each f: its name, rows rebuilt wrong, unsafe elements, the largest |x|.
      gradient_error: relative distance of the gradients from those of the stored run; None if not reached.
      difference_error: relative distance from finite differences in float64; None if not checked.
    """

    faults: list[str]
    notes: list[str]
    rows: list[tuple[str, int, int, float]]
    gradient_error: float | None
    difference_error: float | None

    @property
    def ok(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        out = io.StringIO()
        console = Console(file=out, width=110, highlight=False, force_jupyter=False)
        if self.rows:
            table = Table("branch", "rows rebuilt wrong", "unsafe elements", "max |x|", title="reversible stack")
            for name, wrong, unsafe, largest in _shortened(self.rows):
                table.add_row(name, str(wrong), str(unsafe), largest if isinstance(largest, str) else f"{largest:.4g}")
            console.print(table)
        shown = lambda error: "not checked" if error is None else f"{error:.1e}"
        console.print(f"gradients against the stored run   {shown(self.gradient_error)}")
        console.print(f"gradients against differences      {shown(self.difference_error)}")
        for kind, lines in (("FAULT", self.faults), ("note", self.notes)):
            for line in lines:
                console.print(f"{kind}: {line}", markup=False)
        floats = any(note.startswith("Float streams") for note in self.notes)
        unchecked = ", but derivatives were not compared with differences" if self.difference_error is None else ""
        good = "the gradients are right, but float streams drift" if floats else f"exact; safe to train{unchecked}"
        console.print("verdict: " + (good if self.ok else f"{len(self.faults)} fault(s); do not train"))
        return out.getvalue().rstrip()


def check(model: nnx.Module, example: PyTree, *, key: jax.Array | None = None, **inputs: PyTree) -> CheckReport:
    """Checks a `ReversibleStack`, or any model that holds some, on one example.

    Args:
      model: called as `model(example)`, or `model(*example)` if that is a tuple; returns floats, an array or
        several (`(logits, auxiliary)`). They are multiplied by fixed random numbers and summed: the loss of the check.
      example: a small batch, rows first: x for a stack, tokens for a language model.
      key: passed as `key=`, for what is random in training; None leaves it out, unless the coupling needs one.
      inputs: passed on by name (context, side inputs).

    Example:
      >>> report = revjax.check(stack, jnp.ones((2, 16, 64)))
      >>> print(report)
      >>> assert report.ok
    """
    stacks = stacks_of(model)
    if not stacks:
        raise TypeError(
            f"check looks at reversible stacks, but {type(model).__name__} holds none. Put its layers into a "
            "revjax.ReversibleStack(make_block, num_layers=..., rngs=...)."
        )
    faults: list[str] = []
    notes: list[str] = []
    if key is None and any(stack.coupling.random for stack in stacks.values()):
        key = jax.random.key(0)  # without one it would be evaluated, as an ordinary network
    run = lambda model, example, key, inputs=inputs: _loss(model, example, key, inputs)
    log = get_logger(__name__).info
    calls, repeat = [], True
    try:
        log("check 1 of 4: each kind of branch by itself")
        _at_calls_of_stacks(lambda: run(model, example, key), lambda *call: calls.append(call))
        for stack, x, keywords in calls:
            repeat &= _check_branches(stack, x, keywords, faults, notes)
            if not stack.exact:
                drift = float(jnp.max(stack.reconstruction_error(x, **_of_branches(keywords))))
                notes.append(
                    f"Float streams: the inverse is off by up to {drift:.1e}, and no canary can tell in training."
                )
    except MutatedVariableError as error:
        return CheckReport([str(error)], ["Nothing else was checked."], [], None, None)
    log("check 2 of 4: every layer, rebuilt")
    rows, grads = _check_rebuilding(run, model, example, key, faults)
    if not repeat:
        notes.append("Gradients were not compared: they are those of no function.")
        return CheckReport(faults, notes, rows, None, None)
    if not all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads)):
        faults.append(
            "Gradients hold NaN or infinite numbers on this example, so they were compared with nothing. Is there a "
            "division by 0, or a root or logarithm of it?"
        )
        return CheckReport(faults, notes, rows, None, None)
    if unused := [name_of(path) for path, g in jax.tree.leaves_with_path(grads) if not jnp.any(g)]:
        notes.append(
            f"The gradient is 0 in all of {listed(unused)}: nothing that is returned depends on it (what is used by "
            "closure is a copy), or a factor after it is 0 at first."
        )
    log("check 3 of 4: gradients against the stored run")
    gradient_error = _check_against_stored(run, model, example, key, grads, faults)
    log("check 4 of 4: gradients against differences, in float64")
    difference_error = check_against_differences(run, model, example, key, inputs, faults, notes, casting=_casting)
    return CheckReport(faults, notes, rows, gradient_error, difference_error)


def _loss(model: nnx.Module, example: PyTree, key: jax.Array | None, inputs: dict[str, PyTree]) -> jax.Array:
    args = example if isinstance(example, tuple) else (example,)
    out = model(*args, **({} if key is None else {"key": key}), **inputs)
    rng = np.random.default_rng(0)
    weighted = lambda y: jnp.sum(y * rng.standard_normal(y.shape).astype(y.dtype)) / y.size**0.5
    floats = [y for y in jax.tree.leaves(out) if jnp.issubdtype(y.dtype, jnp.floating)]
    if not floats:
        raise TypeError(f"check needs a model that returns floats, but {type(model).__name__} returned none.")
    return functools.reduce(lambda total, y: total + weighted(y), floats[1:], weighted(floats[0]))


def _at_calls_of_stacks(run: Callable, visit: Callable) -> None:
    """Runs `run()`, and before each call of a stack `visit(stack, x, keywords)`."""
    scan = ReversibleStack.scan

    def listen(stack, x, **keywords):
        visit(stack, x, keywords)
        return scan(stack, x, **keywords)

    cast(Any, ReversibleStack).scan = listen
    try:
        run()
    finally:
        cast(Any, ReversibleStack).scan = scan


def _check_branches(stack: ReversibleStack, x, keywords: dict, faults: list[str], notes: list[str]) -> bool:
    """Runs each kind of branch by itself, on what the first f reads. Whether all give the same twice."""
    repeat = True
    names = {name for branches in stack.runs for branch in branches for name in keywords_of(branch)}
    if keywords.get("key") is not None and not {"key", ...} & names:
        notes.append(
            "The stack is called with a key, but no branch takes one, so nothing is random in training: for dropout, "
            "name it, `def __call__(self, x, *, key=None)`."
        )
    for name, run, params, first in _branches(stack, x, keywords):
        x = jnp.asarray(first, jnp.float32)
        if not _same(run(params, x), run(params, x)):
            faults.append(
                f"{name} is not the same function twice: called again with the same arguments, it returned something "
                "else. Random numbers must come from `key=`, not from numpy or Python; nothing may be counted between "
                "calls."
            )
            repeat = False
            continue
        largest, step = float(jnp.max(jnp.abs(run(params, x)))), 2.0**-stack.fraction_bits
        if stack.exact and 0 < largest < step:
            notes.append(
                f"{name} returns increments of at most {largest:.1e}, but streams are whole multiples of {step:.1e}, "
                "so they are lost or rounded to one: let it begin with larger ones (a larger layer scale)."
            )
        if _returns_its_input(run, params, x):
            faults.append(
                f"{name} returns x + f(x), but a branch returns the increment f(x): the coupling adds x. Leave the "
                "residual connection out of the block."
            )
        if low_precision(run, params, x) and not _same_beside_gradient(run, params, x):
            if _same_beside_gradient(pin(run), params, x):
                notes.append(
                    f"{name} computes in low precision, and XLA leaves out different roundings where it is also "
                    "differentiated (excess precision). The stack pins them, so it is exact all the same."
                )
            else:
                faults.append(
                    f"{name} gives other bits beside its gradient than alone, though its roundings are pinned: some "
                    "operation in it (a custom kernel?) does not compute the same twice."
                )
    return repeat


def _branches(stack: ReversibleStack, x, keywords: dict) -> Iterator[tuple[str, Callable, PyTree, jax.Array]]:
    """Each kind of branch, of its first layer: its name, `run(params, x, key=)`, its parameters, and x."""
    keywords = _of_branches(keywords)
    _, x = x if isinstance(x, tuple) else (None, x)
    key = keywords.pop("key", None)
    context = {"context": keywords.pop("context")} if "context" in keywords else {}
    for branch in (branch for branches in stack.runs for branch in branches):
        f, params_L, state_L = branch_function(branch)
        params, state = jax.tree.map(lambda a: a[0], (params_L, state_L))
        needed = key if "key" in keywords_of(branch, required=True) else None

        def run(params, x, key=key, f=f, state=state, needed=needed):
            key = needed if key is None else key
            result = f(params, x, side=(state, key), shared=keywords, **context)
            return result[0] if isinstance(result, tuple) else result

        yield f.__name__, run, params, x


def _of_branches(keywords: dict[str, PyTree]) -> dict[str, PyTree]:
    return {k: v for k, v in keywords.items() if k not in ("coupling", "plan", "cache") and v is not None}


def _same(a: jax.Array, b: jax.Array) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True))


def _returns_its_input(run: Callable, params: PyTree, x: jax.Array) -> bool:
    """With all parameters 0, an increment hardly depends on x; x + f(x) moves exactly as x does."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    other = x + jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    moved = run(zeros, other, key=None).astype(jnp.float32) - run(zeros, x, key=None).astype(jnp.float32)
    return bool(jnp.linalg.norm(moved - (other - x)) < 0.05 * jnp.linalg.norm(other - x))


def _same_beside_gradient(run: Callable, params: PyTree, x: jax.Array) -> bool:
    alone = jax.jit(run)(params, x)
    with_gradient = jax.jit(lambda params, x: (lambda y, vjp: (y, vjp(y)))(*jax.vjp(run, params, x)))
    return _same(alone, with_gradient(params, x)[0])


def _check_rebuilding(run, model, example, key, faults):
    (_, report), grads = jax.jit(lambda model: value_and_grad(run)(model, example, key))(model)
    rows = []
    for path, stack in stacks_of(model).items():
        counts = np.asarray(report.stacks[path])
        names = [f"{path}: {name}" if path else name for name in stack.names]
        rows += [(name, int(w), int(u), float(m)) for name, (w, u, m) in zip(names, counts, strict=True)]
    unexplained = bool(report.canary) and not faults and not float(report.unsafe)
    if float(report.canary) or float(report.unsafe):
        faults += report.describe(model).split("\n")
    if unexplained:
        faults.append(
            "No branch differs by itself, so this may well be a fault of revjax: an operation that XLA computes in "
            "another way beside its gradient. Please report the block. plan='all' stores activations instead of "
            "rebuilding them, and is right all the same."
        )
    return rows, grads


def _check_against_stored(run, model, example, key, grads, faults) -> float:
    stored = nnx.clone(model)
    for stack in stacks_of(stored).values():
        stack.plan = "all"
    expected = jax.jit(lambda model: value_and_grad(run)(model, example, key))(stored)[1]
    error = _distance(grads, expected)
    tolerance = LOW_TOLERANCE if low_precision(lambda m: run(m, example, key), model) else TOLERANCE
    if not error <= tolerance:
        faults.append(
            f"The gradients differ from those of stored activations by {error:.1e}, where {tolerance:.0e} is what the "
            "order of sums explains. Is something in a branch not the same twice?"
        )
    return error


def _casting(loss: Callable) -> list[str]:
    """What gives less precise floats than it takes, in float64: branches that `loss()` calls, or the model itself."""
    names: dict[str, None] = {}

    def visit(stack, x, keywords):
        for name, f, params, first in _branches(stack, x, keywords):
            if _casts_down(jax.make_jaxpr(f)(params, first).jaxpr):
                names[name] = None

    found = []
    _at_calls_of_stacks(lambda: found.append(jax.eval_shape(loss)), visit)
    return [*names, *(["the model's output"] if found[0].dtype != jnp.float64 else [])]


def _casts_down(jaxpr: Any) -> bool:
    """Whether an operation in it takes floats, and gives an array of less precise ones."""
    arrays = lambda atoms: [a.aval for a in atoms if a.aval.ndim and jnp.issubdtype(a.aval.dtype, jnp.floating)]
    bytes_of = lambda atoms: [a.dtype.itemsize for a in arrays(atoms)]
    for eqn in jaxpr.eqns:
        taken, given = bytes_of(eqn.invars), bytes_of(eqn.outvars)
        if taken and given and min(given) < max(taken):
            return True
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"))
        if any(_casts_down(getattr(p, "jaxpr", p)) for p in inner if hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            return True
    return False


def _distance(a: PyTree, b: PyTree) -> float:
    flat = lambda tree: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])
    return float(jnp.linalg.norm(flat(a) - flat(b)) / jnp.maximum(jnp.linalg.norm(flat(b)), 1e-30))


def _shortened(rows: list, most: int = 40) -> list:
    """Long stacks show the layers that went wrong, and the first and last few; a row stands where others are left out.

    Of more than `most`, the first are shown.
    """
    if len(rows) <= most:
        return rows
    shown = [i for i, (_, wrong, unsafe, _) in enumerate(rows) if wrong or unsafe or i < 4 or i >= len(rows) - 4][:most]
    table = []
    for i, following in zip([-1, *shown], [*shown, len(rows)]):
        table += [rows[i]] if i >= 0 else []
        left_out = rows[i + 1 : following]
        bad = sum(bool(wrong or unsafe) for _, wrong, unsafe, _ in left_out)
        how = f"{bad:,} of them wrong" if bad else "nothing wrong"
        table += [(f"({len(left_out)} more, {how})", "", "", "")] if left_out else []
    return table
