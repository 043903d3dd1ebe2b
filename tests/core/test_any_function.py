"""Whatever arithmetic f does, in fp32 or bf16, it is rebuilt to the bit: random programs, also with loops of their own.

Unpinned, a third of the fp32 programs were not: XLA merges products with the sums after them (fused multiply-add),
takes quotients apart, and compiles a loop as one function or by the operation, each as its neighbours suggest.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.core import NearResidual, RevNet, Run, pin, reversible_scan, transcendental

pytestmark = pytest.mark.optimized

B, T, D = 3, 24, 40


def over_time(step, h, *xs):
    first = jnp.zeros((h.shape[0], h.shape[2]), h.dtype)
    along = lambda a: a.swapaxes(0, 1)
    carry_and_output = lambda c, x: (step(c, *x),) * 2
    return along(jax.lax.scan(carry_and_output, first, tuple(along(x) for x in (h, *xs)))[1])


def depthwise(w, h):
    kernel = w[:3, None, :]
    return jax.lax.conv_general_dilated(
        h, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=h.shape[-1]
    )


def pooled(reduce, start, h):
    return jax.lax.reduce_window(h, np.array(start, h.dtype), reduce, (1, 3, 1), (1, 1, 1), "SAME")


def linear_recurrence(a, x):
    combine = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    return jax.lax.associative_scan(combine, (a, x), axis=1)[1]


def layer_norm(w, h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5) * row(w, 0) + row(w, 1)


def row(w, i):
    return w[i][None, None]


# (w, h, x): w (D, D) parameters, h what came out of the operation before, x what went into it
OPERATIONS = {
    "matmul": lambda w, h, x: h @ w,
    "rms norm": lambda w, h, x: h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6),
    "layer norm": lambda w, h, x: layer_norm(w, h),
    "multiply-add": lambda w, h, x: jnp.tanh(h * row(w, 0) + x) * h + row(w, 1),
    "square": lambda w, h, x: (lambda t: t * t + t)(h * row(w, 0)),
    "sine": lambda w, h, x: (lambda t: jnp.sin(t) + t * x)(h * row(w, 2)),
    "gate": lambda w, h, x: jax.nn.sigmoid(h * row(w, 3) + row(w, 4)) * h + x,
    "silu": lambda w, h, x: jax.nn.silu(h),
    "bump": lambda w, h, x: jnp.exp(-h * h) * x + h,
    "quotient": lambda w, h, x: h / (1 + jnp.abs(x * row(w, 1) + h)),
    "shift": lambda w, h, x: h + jnp.roll(h, 1, 1) * row(w, 0),
    "cumulative": lambda w, h, x: jnp.cumsum(h, 1) / T,
    "centre": lambda w, h, x: h - h.mean(1, keepdims=True),
    "variance": lambda w, h, x: h / (1 + jnp.var(h, axis=1, keepdims=True)),
    "softmax": lambda w, h, x: jax.nn.softmax(3 * h, -1) * h,
    "log sum exp": lambda w, h, x: h - jax.nn.logsumexp(h, -1, keepdims=True),
    "attention": lambda w, h, x: jnp.einsum("bts,bsd->btd", jnp.einsum("btd,bsd->bts", h, x) / D, h) / T,
    "convolution": lambda w, h, x: depthwise(w, h),
    "mean pool": lambda w, h, x: pooled(jax.lax.add, 0, h) / 3,
    "max pool": lambda w, h, x: pooled(jax.lax.max, -np.inf, h) * row(w, 0),
    "linear recurrence": lambda w, h, x: linear_recurrence(jax.nn.sigmoid(h + row(w, 0)), h),
    "state space": lambda w, h, x: over_time(lambda c, h, a: a * c + h * w[1][None], h, jax.nn.sigmoid(h)),
    "recurrent": lambda w, h, x: over_time(lambda c, h: jnp.tanh(c @ w + h), h),
    "iterated": lambda w, h, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) * row(w, 0) + x, h),
}


def heads(h, n):
    return h.reshape(B, T, n, D // n)


def rms(h):
    return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


# In loops whose innermost dimension is short.
BY_HEAD = {
    "norm of 4 heads": lambda w, h, x: rms(heads(h, 4)).reshape(B, T, D),
    "norm of 10 heads": lambda w, h, x: rms(heads(h, 10)).reshape(B, T, D),
    "turned heads": lambda w, h, x: jnp.exp(-jnp.abs(heads(h, 10))).swapaxes(-1, -2).reshape(B, T, D) * x,
    "log of fours": lambda w, h, x: (jnp.log(1e-3 + jnp.abs(heads(h, 10))) * heads(x, 10)).reshape(B, T, D),
    "decay": lambda w, h, x: h * jnp.exp(-jax.nn.softplus(x.mean(-1, keepdims=True))),
    "log": lambda w, h, x: jnp.log(1 + jnp.abs(h) * row(w, 2) ** 2) + h * 0.1,
}


def random_function(rng, dtype):
    return function(rng.choice(list(OPERATIONS), rng.integers(3, 8)), dtype)


def function(names, dtype):
    operations = OPERATIONS | BY_HEAD

    def f(w, x):
        h = before = x.astype(dtype)
        for i, name in enumerate(names):
            h, before = operations[name](w[i].astype(dtype), h, before), h
        return h

    return f


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(6))
def test_random_functions_are_rebuilt_to_the_bit(seed, dtype):
    rng, num_layers = np.random.default_rng(seed), 1 if seed == 5 else 6  # a loop that runs once is compiled as none
    fns = random_function(rng, dtype), random_function(rng, dtype)
    canary = canary_of(fns, RevNet() if seed % 2 else NearResidual(1), num_layers, seed)
    assert canary[:, 0].sum() == 0
    assert canary[:, 1].sum() == 0


def canary_of(fns, coupling, num_layers, seed):
    w_L = jax.random.normal(jax.random.key(seed), (2, num_layers, 8, D, D)) / D**0.5
    x = jax.random.normal(jax.random.key(seed + 1), (B, T, D))

    def loss(w_L, canary):
        result = reversible_scan(Run(fns, (w_L[0], w_L[1])), x, coupling=coupling, canary=canary)
        return jnp.mean(jnp.tanh(result.mean) ** 2)

    return jax.jit(jax.grad(loss, (0, 1)))(w_L, jnp.zeros((2 * num_layers, 3)))[1]


@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize(
    "seed, names",
    [
        (0, ("log sum exp,norm of 4 heads,gate,centre", "decay,centre,log sum exp,state space,log")),
        (1, ("norm of 4 heads,log of fours,norm of 10 heads,centre,mean pool", "turned heads,max pool")),
    ],
)
def test_functions_in_short_loops_are_rebuilt_to_the_bit(seed, names, is_pinned, monkeypatch):
    """jax 0.12 has other approximations of exp, log and rsqrt for a loop over four heads than for a long one."""
    if not is_pinned:
        monkeypatch.setattr(transcendental, "FUNCTIONS", set())
        monkeypatch.setattr(transcendental, "rsqrt", lambda x, seal: jax.lax.rsqrt(x))
    fns = [function(each.split(","), jnp.float32) for each in names]
    coupling = RevNet() if seed % 2 else NearResidual(1)
    shows(canary_of(fns, coupling, 6, seed), is_pinned)


def shows(canary, is_pinned):
    """Without what pins it, a function is not rebuilt to the bit, unless this CPU or this jax computes it alike."""
    wrong = canary[:, 0].sum()
    assert wrong == 0 or not is_pinned
    if not is_pinned and wrong == 0:
        pytest.skip("nothing has to be pinned here: other CPUs, or other versions of jax, have other approximations")


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_quotient_by_one_number_is_rebuilt_to_the_bit(is_pinned, monkeypatch):
    """Of a number of the layer, and of one of all activations: XLA would take its reciprocal in one pass only."""
    if not is_pinned:
        monkeypatch.setattr(sys.modules["revjax.core.pin"]._Pinned, "_seal", lambda self, x: x)
    by_layer = lambda w, x: jax.nn.gelu(x @ w[0]) / (2 + w[1, 0, 0])
    by_all = lambda w, x: (x @ w[0]) / (1 + jnp.abs(x.mean()))
    shows(canary_of((by_layer, by_all), RevNet(), 6, 0), is_pinned)


@pytest.mark.parametrize("is_apart", [True, False])
def test_a_function_of_many_operations_is_apart_in_long_loops_too(is_apart, monkeypatch):
    if not is_apart:
        monkeypatch.setattr(transcendental, "ALWAYS_APART", set())
    up, down = jax.random.normal(jax.random.key(0), (2, 4, 16, 512)) / 512**0.5
    x = jax.random.normal(jax.random.key(1), (2, 24, 16))
    f = lambda w, x: jax.lax.lgamma(1 + jnp.abs(x @ w[0])) @ w[1].T

    def loss(w, canary):
        return jnp.mean(reversible_scan(Run(f, w), x, coupling=NearResidual(1), canary=canary).mean ** 2)

    shows(jax.jit(jax.grad(loss, (0, 1)))((up, down), jnp.zeros((4, 3)))[1], is_apart)


def test_a_function_is_apart_where_a_loop_through_it_may_be_short():
    def num_apart(f, *shapes):
        jaxpr = jax.make_jaxpr(f)(*(jnp.ones(shape) for shape in shapes)).jaxpr
        found = transcendental.in_short_loops(jaxpr)
        return sum(eqn.primitive.name == "exp" and eqn.outvars[0] in found for eqn in jaxpr.eqns)

    assert num_apart(lambda x: jnp.exp(x) * 2 + x, (8, 64)) == 0
    assert num_apart(lambda x: jnp.exp(x) * 2 + x, (8, 60)) == 1
    assert num_apart(lambda x: (jnp.exp(x) * 2).reshape(8, 16, 4), (8, 64)) == 1  # the loop is over fours
    assert num_apart(lambda x: jnp.exp(x.T) * 2, (32, 4)) == 1  # and here reads every fourth
    assert num_apart(lambda x: jnp.exp(x) @ jnp.ones((64, 3)), (8, 64)) == 0  # a product is a loop of its own
    assert num_apart(lambda x, m: jnp.exp(x - m), (8, 64), (8, 1)) == 0  # one m for a row
    assert num_apart(lambda x, m: x * jnp.exp(m), (8, 64), (8, 1)) == 1  # eight, one by one


def test_a_root_and_a_quotient_are_rsqrt_rounded_correctly():
    x = jnp.asarray(np.random.default_rng(0).uniform(0.01, 9, 4096), jnp.float32)
    exact = (1 / np.sqrt(np.asarray(x))).astype(np.float32)
    assert np.array_equal(jax.jit(pin(jax.lax.rsqrt))(x), exact)


def test_a_product_is_sealed_where_a_sum_reads_it_and_only_there():
    sealed = lambda f: str(jax.make_jaxpr(pin(f))(jnp.ones(4), jnp.ones(4))).count(" or ")
    assert sealed(lambda a, b: a * b + a) == 1
    assert sealed(lambda a, b: -(a * b)[:2] - a[:2]) == 1
    assert sealed(jax.jit(lambda a, b: jax.jit(jnp.exp)(a) + b)) == 1
    assert sealed(lambda a, b: a / jnp.sqrt(b)) == 2  # else a * rsqrt(b), where nothing else reads the root
    assert sealed(lambda a, b: a / b) == 1  # else a * (1 / b), where b is one number for all of a
    assert sealed(lambda a, b: (a + b) * a * b) == 0
