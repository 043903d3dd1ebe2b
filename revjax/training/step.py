"""One step of training, as a pure function of state and batch.

    gradient = (sum over micro-batches of d loss_sum / d params) / (sum of weights)       divided once, after all rows
    state    = update(state, gradient)                                unless the gradient cannot be trusted

A gradient is not trusted where the canary or the overflow count is not 0, where the loss or the gradient's norm is
not finite, or where the loss is a spike. The host reads metrics one step late, so the step itself has to refuse the
update: old and new values are both there, and `jnp.where` takes one of them.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..models.gradients import value_and_add_grad, value_and_grad
from .layer_updates import LayerUpdates
from .loss_scale import next_loss_scale
from .norms import KnownNorm, global_norm
from .spikes import find_spike
from .state import Nested, Skeleton, TrainState, to_nested, united

PyTree = Any
# (sum of losses, sum of weights), and maybe a dict of further sums, which are reported as means.
Loss = Callable[[nnx.Module, PyTree, jax.Array | None], tuple]
OnTrouble = Literal["warn", "skip", "rewind", "stop"]
InBackward = Literal["one_sweep", "two_sweeps"]


def make_train_step(
    skeleton: Skeleton,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    schedule: Callable[[jax.Array], jax.Array] | None = None,
    on_trouble: OnTrouble = "skip",
    accumulation: int = 1,
    ema_decay: float | None = None,
    spike_sigmas: float | None = None,
    in_backward: InBackward | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Any]]]:
    """Returns `(state, batch) -> (state, metrics)`, for `jax.jit(..., donate_argnums=0)`.

    Args:
      skeleton: the module without its parameters, from `split(model)`.
      loss: `loss(model, batch, key)` returns (sum of losses, sum of weights), or these and a dict of further sums,
        whose means join the metrics. The key is another one at every step, and the same one where that step is run
        again.
      schedule: the learning rate by number of updates, for the metric only.
      on_trouble: "warn" updates all the same; any other keeps parameters and optimizer as they were.
      accumulation: into how many micro-batches the rows are dealt, one after another, to need less memory. It must
        divide the leading axis of every array in the batch. Each micro-batch has a key of its own.
      ema_decay: of the running mean of the parameters, where the state has one.
      spike_sigmas: how far above recent losses one counts as a spike, where the state counts them (see `spikes`).
      in_backward: update layers of stacks in the backward pass (see `layer_updates`), with an optimizer that treats
        each element by itself, but for `norms.clip_by_global_norm`. "one_sweep" cannot take back what it updated before
        something was found to be wrong, so it goes without spikes and loss scales; neither goes with "warn". None:
        after the backward pass.

    Metrics are scalars, but for the last: loss (mean), grad_norm (before clipping), param_norm, learning_rate, canary
    (rows not rebuilt to the bit), unsafe (elements that were not finite or overflowed), max_abs (of the streams),
    spike, trouble (whether this gradient is not to be trusted), skipped (updates left out so far), loss_scale
    (float16), and report (`revjax.models.Report`, layer by layer).
    """
    if on_trouble not in ("warn", "skip", "rewind", "stop"):
        raise ValueError(f"on_trouble must be 'warn', 'skip', 'rewind' or 'stop', but got {on_trouble!r}.")
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1, but got {accumulation}.")
    if in_backward is not None and accumulation > 1:
        raise ValueError("Updates in the backward pass have no gradients to add up: accumulation must be 1.")
    if in_backward is not None and on_trouble == "warn":
        raise ValueError(
            "Updates in the backward pass leave out what is known to be wrong: on_trouble cannot be 'warn'."
        )
    if in_backward == "one_sweep" and spike_sigmas is not None:
        raise ValueError("A spike is known after the layers were updated in one sweep: in_backward='two_sweeps'.")
    optimizer = optax.with_extra_args_support(optimizer)
    if in_backward is None:
        move = _move_after(_accumulated(_gradient_sums(skeleton, loss), accumulation), optimizer)
    else:
        move = _move_in_backward(LayerUpdates(skeleton, loss, optimizer), two_sweeps=in_backward == "two_sweeps")

    def judge(state: TrainState, value, grad_norm, report) -> Verdict:
        is_finite, spike, after = jnp.isfinite(grad_norm), jnp.bool(False), {}
        trouble = (report.canary != 0) | (report.unsafe != 0) | ~jnp.isfinite(value)
        if state.loss_scale:  # there, an infinite gradient says that the scale is too large
            after["loss_scale"] = next_loss_scale(state.loss_scale, is_finite)
        else:
            trouble |= ~is_finite
        if state.spikes and spike_sigmas is not None:
            spike, after["spikes"] = find_spike(state.spikes, value, spike_sigmas)
            trouble |= spike
        refuse = (trouble & (on_trouble != "warn")) | (~is_finite if state.loss_scale else False)
        return Verdict(value, grad_norm, trouble, refuse, spike, after)

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        if in_backward == "one_sweep" and state.loss_scale:
            raise ValueError("A loss scale that is too large is known too late: in_backward='two_sweeps'.")
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        scale = state.loss_scale.get("scale", 1.0)
        moved = move(state, batch, key, scale, lambda *found: judge(state, *found))
        params, opt_state, report = moved.params, moved.opt_state, moved.report
        value, grad_norm, trouble, refuse, spike, after = moved.verdict
        follow = lambda mean, new: mean + (1 - (ema_decay or 0.0)) * (new - mean)
        ema = jax.tree.map(follow, state.ema, params) if state.ema else {}
        keep_old = lambda new, old: jax.tree.map(lambda n, o: jnp.where(refuse, o, n), new, old)
        keep_moved = (lambda new, old: new) if moved.is_kept else keep_old
        new_state = TrainState(
            params=keep_moved(params, state.params),
            frozen=state.frozen,
            opt_state=keep_moved(opt_state, state.opt_state),
            ema=keep_old(ema, state.ema),
            step=state.step + 1,
            skipped=state.skipped + refuse,
            key=state.key,
            **({"loss_scale": state.loss_scale, "spikes": state.spikes} | after),
        )
        metrics = moved.means | {
            "loss": value,
            "grad_norm": grad_norm,
            "param_norm": global_norm(new_state.params),
            "canary": report.canary,
            "unsafe": report.unsafe,
            "max_abs": report.max_abs,
            "spike": spike,
            "trouble": trouble,
            "skipped": new_state.skipped,
            "report": report,
        }
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step - state.skipped)
        if state.loss_scale:
            metrics["loss_scale"] = scale
        return new_state, metrics

    return train_step


class Verdict(NamedTuple):
    """What is made of a gradient: the mean loss, its norm, whether it is to be trusted, and the counts that follow."""

    loss: jax.Array
    grad_norm: jax.Array
    trouble: jax.Array
    refuse: jax.Array
    spike: jax.Array
    after: dict[str, Any]


class Moved(NamedTuple):
    """What became of parameters and optimizer, with the means of further sums of the loss.

    `is_kept`: where the verdict refuses, they are the old ones already, as far as they can be.
    """

    params: Any
    opt_state: PyTree
    means: dict[str, jax.Array]
    report: Any
    verdict: Verdict
    is_kept: bool = False


def _move_after(sums: Callable, optimizer: optax.GradientTransformationExtraArgs) -> Callable:
    """The update after the backward pass."""

    def move(state: TrainState, batch, key, scale, judge) -> Moved:
        grads, (total, weight, more), report = sums(state.params, state.frozen, batch, key, scale)
        weight = jnp.where(weight == 0, 1, weight)
        # No quotient exists as an array: products with 1 / weight are part of the update, wherever it reads a gradient.
        # XLA must not begin before the norm is there, so the factor seems to depend on it, which is never below 0.
        norm = global_norm(grads)
        factor = jnp.where(norm < 0, norm, 1 / (weight * scale))
        value, grad_norm = total / weight, norm * factor
        grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        verdict = judge(value, grad_norm, report)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, known_norm=KnownNorm(grads, grad_norm)
        )
        params = optax.apply_updates(state.params, updates)
        return Moved(params, opt_state, {name: x / weight for name, x in more.items()}, report, verdict)

    return move


def _move_in_backward(layers: LayerUpdates, *, two_sweeps: bool) -> Callable:
    """The update of layers in the backward pass, and of the rest after it."""

    def move(state: TrainState, batch, key, scale, judge) -> Moved:
        values, given = united(state.params, state.frozen), (batch, key, scale)
        if two_sweeps:
            first = layers.squares(values, *given)
            factor, verdict = decide(first, scale, judge)
            norm, refuse = verdict.grad_norm, verdict.refuse
            sweep = layers.update(values, state.opt_state, *given, factor, norm, refuse)
            both = jax.tree.map(jnp.maximum, first.report, sweep.report)  # the second may go wrong by itself
            sweep = sweep._replace(report=both)
            _, verdict = decide(first._replace(report=both), scale, judge)
        else:
            weight, norm = layers.weight(values, batch, key), None
            factor = 1 / (jnp.where(weight == 0, 1, weight) * scale)
            sweep = layers.update(values, state.opt_state, *given, factor)
            factor, verdict = decide(sweep, scale, judge)
        params, opt_state = layers.finish(sweep, state.params, state.opt_state, factor, norm, verdict.refuse)
        means = {name: x * factor * scale for name, x in sweep.summed[2].items()}
        return Moved(params, opt_state, means, sweep.report, verdict, is_kept=True)

    def decide(sweep, scale, judge):
        total, weight, _ = sweep.summed
        weight = jnp.where(weight == 0, 1, weight)
        factor = 1 / (weight * scale)
        return factor, judge(total / weight, sweep.norm * factor, sweep.report)

    return move


def step_compiler_options(backend: str) -> dict[str, bool]:
    """What to compile a training step with, `jax.jit(...).lower(...).compile(compiler_options=...)`.

    The new parameters are made from Adam's old moments, and so are the new moments, in their place. XLA does not see
    that the first can go before the second, and copies the old moments before the step. Its slower analysis sees it.
    (On a GPU the three may be one kernel; that option was not tried there.)
    """
    return {"xla_cpu_copy_insertion_use_region_analysis": True} if backend == "cpu" else {}


def _gradient_sums(skeleton: Skeleton, loss: Loss) -> Callable:
    """(params, frozen, batch, key, scale) -> d (scale loss_sum) / d params, (loss_sum, weight_sum, more sums), report.

    With `so_far`, gradients come added to these.
    """

    def sums(params, frozen, batch, key, scale, so_far=None):
        def scaled(model):
            total, weight, *more = loss(model, batch, key)
            return total * scale, (total, jnp.asarray(weight, jnp.float32), *(more or [{}]))

        model = skeleton.merge(united(params, frozen))
        if so_far is None:
            ((_, summed), report), grads = value_and_grad(scaled, has_aux=True)(model)
        else:
            so_far = skeleton.as_state(so_far)
            ((_, summed), report), grads = value_and_add_grad(scaled, has_aux=True)(model, so_far)
        return to_nested(grads), summed, report

    return sums


def _accumulated(sums: Callable, n: int) -> Callable:
    """`sums` over n micro-batches, of which one after another has its activations; gradients are added in fp32."""
    if n == 1:
        return sums

    def deal(x):
        if not x.ndim or x.shape[0] % n:
            raise ValueError(f"accumulation={n} must divide the rows of every array in a batch, but got {x.shape}.")
        return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)  # rows i, i + n, ... (stay on their device)

    def accumulated(params, frozen, batch, key, scale):
        micro_batches = jax.tree.map(lambda x: deal(jnp.asarray(x)), batch)
        wide = lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32))

        def add(carry, inputs):
            micro_batch, i = inputs
            grads, summed, report = sums(
                params, frozen, micro_batch, jax.random.fold_in(key, i), scale, so_far=carry[0]
            )
            return (grads, jax.tree.map(jnp.add, carry[1], summed), carry[2].merged(report)), None

        one = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(sums, params, frozen, one, key, scale)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = (jax.tree.map(wide, zeros[0]), *zeros[1:])
        (grads, summed, report), _ = jax.lax.scan(add, start, (micro_batches, jnp.arange(n)))
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, shapes[0]), summed, report

    return accumulated


def make_eval_step(skeleton: Skeleton, loss: Loss) -> Callable[[Nested, PyTree], tuple]:
    """Returns `(params, batch) -> what the loss returns`, without randomness, for `jax.jit`."""
    return lambda params, batch: loss(skeleton.merge(params), batch, None)
