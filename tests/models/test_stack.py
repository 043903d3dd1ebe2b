"""Any NNX block, in a reversible stack: exact, with the right gradient, and told when it cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import revjax
from revjax.models import MutatedVariableError, stacks_of

pytestmark = pytest.mark.optimized

D = 16
X = jax.random.normal(jax.random.key(0), (2, 8, D))


class Convolution(nnx.Module):
    """A block that revjax never heard of."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(D, D, kernel_size=(3,), rngs=rngs, dtype=jnp.bfloat16)

    def __call__(self, x):
        return nnx.gelu(self.conv(x))


class StateSpace(nnx.Module):
    """A diagonal state-space layer: h[t] = a h[t-1] + b x[t], y = c h (arXiv:2206.11893), by an inner scan."""

    def __init__(self, rngs):
        self.log_decay = nnx.Param(jax.random.uniform(rngs.params(), (D,)))
        self.b = nnx.Linear(D, D, rngs=rngs)
        self.c = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        decay = jnp.exp(-jnp.exp(self.log_decay[...]))[None]

        def advance(h, u):
            h = decay * h + u
            return h, h

        _, h_TBD = jax.lax.scan(advance, jnp.zeros_like(x[:, 0]), jnp.moveaxis(self.b(x), 1, 0))
        return self.c(jnp.moveaxis(h_TBD, 0, 1))


class Mixer(nnx.Module):
    """Takes a key, a side input and a context."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x, *, key=None, scale=None, context=None):
        y = self.linear(x if context is None else x + context)
        y = y if scale is None else scale * y
        return y if key is None else jnp.where(jax.random.bernoulli(key, 0.9, y.shape), y, 0)


def loss_fn(model, x, **inputs):
    return jnp.mean(model(x, **inputs) ** 2)


def flat(tree):
    return jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(tree)])


def relative(a, b):
    return float(jnp.linalg.norm(flat(a) - flat(b)) / jnp.linalg.norm(flat(b)))


@pytest.mark.parametrize(
    "compile", [lambda f: f, jax.jit, lambda f: jax.jit(jax.jit(f))], ids=["eager", "jit", "nested"]
)
@pytest.mark.parametrize("block", [Convolution, StateSpace])
def test_a_block_from_elsewhere_is_exact_however_it_is_compiled(block, compile):
    stack = revjax.ReversibleStack(block, num_layers=6, rngs=nnx.Rngs(0))
    (_, report), grads = compile(lambda stack: revjax.value_and_grad(loss_fn)(stack, X))(stack)
    assert report.canary == 0 and report.unsafe == 0 and report.max_abs > 1
    assert float(jnp.abs(flat(grads)).max()) > 0


@pytest.mark.parametrize("block, tolerance", [(StateSpace, 1e-5), (Convolution, 2.0**-8)])  # fp32, bf16
def test_gradients_equal_the_stored_run(block, tolerance):
    grads = {}
    for plan in ("nothing", "inputs:2", "all"):
        stack = revjax.ReversibleStack(block, num_layers=6, plan=plan, rngs=nnx.Rngs(0))
        grads[plan] = jax.jit(lambda stack: revjax.value_and_grad(loss_fn)(stack, X))(stack)
    for plan in ("nothing", "inputs:2"):
        assert grads[plan][0][0] == grads["all"][0][0]
        assert relative(grads[plan][1], grads["all"][1]) <= tolerance


def test_branches_and_periods_with_a_remainder():
    stack = revjax.ReversibleStack(
        [lambda rngs: [Convolution(rngs), Mixer(rngs)], StateSpace, StateSpace], num_layers=7, rngs=nnx.Rngs(0)
    )
    layers = ["Convolution", "Mixer"], ["StateSpace"], ["StateSpace"]
    expected = [f"layer {i} {name}" for i in range(7) for name in layers[i % 3]]
    assert stack.names == expected
    assert stack.canary.shape == (len(expected), 3)
    (_, report), _ = jax.jit(lambda stack: revjax.value_and_grad(loss_fn)(stack, X))(stack)
    assert report.canary == 0


def test_layers_run_in_the_order_of_their_names():
    class Mark(nnx.Module):
        def __init__(self, rngs, place):
            self.place = nnx.Param(jnp.asarray(float(place)))

        def __call__(self, x):
            return jnp.zeros_like(x), {"aux": self.place[...]}

    places = iter(range(100))
    stack = revjax.ReversibleStack([lambda rngs: Mark(rngs, next(places))] * 2, num_layers=5, rngs=nnx.Rngs(0))
    assert [a.tolist() for a in jax.tree.leaves(stack.scan(X).aux)] == [[0.0, 0.0], [1.0, 1.0], [2.0]]


def test_every_layer_has_its_own_parameters_and_its_own_key():
    stack = revjax.ReversibleStack(Mixer, num_layers=4, rngs=nnx.Rngs(0))
    kernels = stack.runs[0][0].linear.kernel[...]
    assert kernels.shape == (4, D, D) and not jnp.allclose(kernels[0], kernels[1])
    assert not jnp.array_equal(stack(X, key=jax.random.key(1)), stack(X, key=jax.random.key(2)))
    assert jnp.array_equal(stack(X, key=jax.random.key(1)), stack(X, key=jax.random.key(1)))


def test_side_inputs_and_context_go_where_they_are_named():
    stack = revjax.ReversibleStack(lambda rngs: [Mixer(rngs), Convolution(rngs)], num_layers=2, rngs=nnx.Rngs(0))
    context = jnp.ones_like(X)
    gradient = jax.grad(lambda context: stack(X, context=context, scale=jnp.asarray(0.5)).sum())(context)
    assert jnp.abs(gradient).max() > 0
    with pytest.raises(TypeError, match=r"side input shared\.scale is being differentiated"):
        jax.grad(lambda scale: stack(X, context=context, scale=scale).sum())(jnp.asarray(0.5))
    with pytest.raises(TypeError, match="No branch of this stack takes sclae.*Branches take: context, key, scale"):
        stack(X, sclae=1.0)


def test_a_number_that_differs_by_layer_is_filled_in_and_a_context_may_be_several():
    """As docs/your-own-model.md says."""

    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Variable(jnp.ones(()))

        def __call__(self, x, *, context):
            return self.scale[...] * (context["a"] + 2 * context["b"])

    stack = revjax.ReversibleStack(Scaled, num_layers=3, coupling="residual", plan="all", rngs=nnx.Rngs(0))
    stack.runs[0][0].scale[...] = jnp.array([1.0, 10.0, 100.0])
    run = lambda context: stack(jnp.zeros_like(X), context=context).sum()
    gradient = jax.grad(run)({"a": jnp.ones_like(X), "b": jnp.ones_like(X)})
    assert jnp.allclose(gradient["a"], 111) and jnp.allclose(gradient["b"], 222)


def test_what_a_branch_needs_and_is_not_given_is_named():
    class Masked(Mixer):
        def __call__(self, x, mask, *, key, train: bool = False):
            return jnp.where(mask, self.linear(x), 0)

    stack = revjax.ReversibleStack(Masked, num_layers=2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"Masked needs mask, key, which .* stack\(x, mask=..., key=...\)"):
        stack(X)
    assert stack(X, mask=jnp.ones((2, 8, 1), bool), key=jax.random.key(0)).shape == X.shape


def test_a_gradient_is_taken_by_optax_and_by_nnx_optimizers():
    stack = revjax.ReversibleStack(Mixer, num_layers=3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(stack, optax.adam(1e-2), wrt=nnx.Param)
    losses = []
    for _ in range(5):
        ((loss, _), report), grads = revjax.value_and_grad(lambda m: (loss_fn(m, X), 0), has_aux=True)(stack)
        optimizer.update(stack, grads)
        losses.append(float(loss))
    assert losses[-1] < losses[0] and report.canary == 0


def test_bdia_is_an_ensemble_in_training_and_the_ordinary_network_in_evaluation():
    stack = revjax.ReversibleStack(Mixer, num_layers=4, coupling=revjax.BDIA(), rngs=nnx.Rngs(0))
    ordinary = revjax.ReversibleStack(Mixer, num_layers=4, coupling=revjax.Residual(), plan="all", rngs=nnx.Rngs(0))
    nnx.update(ordinary, nnx.state(stack, nnx.Param))
    assert jnp.array_equal(stack(X), ordinary(X))
    (_, report), _ = revjax.value_and_grad(loss_fn)(stack, X, key=jax.random.key(0))
    assert report.canary == 0
    assert not jnp.array_equal(stack(X, key=jax.random.key(0)), stack(X, key=jax.random.key(1)))


def test_the_canary_is_not_a_parameter():
    stack = revjax.ReversibleStack(Mixer, num_layers=3, rngs=nnx.Rngs(0))
    assert len(jax.tree.leaves(nnx.state(stack, nnx.Param))) == 2
    _, grads = revjax.value_and_grad(loss_fn)(stack, X)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(stack, nnx.Param))


def test_overflow_names_the_layer_and_the_bits_to_set():
    class Loud(Mixer):
        def __call__(self, x):
            return 1e4 * self.linear(x)

    stack = revjax.ReversibleStack([Mixer, Loud], num_layers=4, rngs=nnx.Rngs(0))
    (loss, report), _ = revjax.value_and_grad(loss_fn)(stack, 100 * X)
    assert report.unsafe > 0 and jnp.isnan(loss)
    assert "first in layer 1 Loud" in report.describe(stack) and "set fraction_bits=13" in report.describe(stack)
    wider = revjax.ReversibleStack([Mixer, Loud], num_layers=2, fraction_bits=8, rngs=nnx.Rngs(0))
    (loss, report), _ = revjax.value_and_grad(loss_fn)(wider, 10 * X)
    assert report.unsafe == 0 and report.describe(wider) == ""


def test_a_report_is_read_at_a_glance():
    (_, report), _ = revjax.value_and_grad(loss_fn)(revjax.ReversibleStack(Mixer, num_layers=2, rngs=nnx.Rngs(0)), X)
    assert repr(report).startswith("Report(canary=0, unsafe=0, max_abs=")


def test_an_error_inside_a_block_says_in_which():
    stack = revjax.ReversibleStack([Mixer, Convolution], num_layers=2, rngs=nnx.Rngs(0))
    with pytest.raises(Exception) as e:
        stack(X[..., :8])
    assert "in Mixer, a block of a ReversibleStack, called with x of float32[2, 8, 8]" in "".join(e.value.__notes__)


def test_a_block_that_holds_randomness_is_refused_with_the_way_out():
    class Dropped(Mixer):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.linear(x))

    stack = revjax.ReversibleStack(Dropped, num_layers=2, rngs=nnx.Rngs(0))
    with pytest.raises(MutatedVariableError, match="Dropped draws random numbers.*key=None"):
        stack(X)


def test_a_block_that_writes_to_a_variable_is_refused():
    class Normed(Mixer):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.norm = nnx.BatchNorm(D, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    stack = revjax.ReversibleStack(Normed, num_layers=2, rngs=nnx.Rngs(0))
    with pytest.raises(MutatedVariableError, match="Normed changes its variables.*norm.mean, norm.var"):
        stack(X)


def test_what_is_not_a_block_is_refused():
    with pytest.raises(TypeError, match="must return an nnx.Module"):
        revjax.ReversibleStack(lambda rngs: 3, num_layers=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_layers of at least 1"):
        revjax.ReversibleStack(Mixer, num_layers=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a whole number, .* got num_layers=2.0"):
        revjax.ReversibleStack(Mixer, num_layers=2.0, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="its list is empty"):
        revjax.ReversibleStack(lambda rngs: [], num_layers=2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="coupling must be a coupling, such as revjax.NearResidual.4., or its name"):
        revjax.ReversibleStack(Mixer, num_layers=2, coupling=revjax.RevNet, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="must be an nnx.Module, but got dict"):
        revjax.value_and_grad(loss_fn)({}, X)


def test_stacks_are_found_by_path():
    class Model(nnx.Module):
        def __init__(self):
            self.first = revjax.ReversibleStack(Mixer, num_layers=2, rngs=nnx.Rngs(0))
            self.second = revjax.ReversibleStack(Mixer, num_layers=3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.second(self.first(x))

    model = Model()
    assert set(stacks_of(model)) == {"first", "second"}
    (_, report), _ = revjax.value_and_grad(loss_fn)(model, X)
    assert {path: a.shape for path, a in report.stacks.items()} == {"first": (2, 3), "second": (3, 3)}


def test_exact_streams_have_no_reconstruction_error_and_float_streams_do():
    x = 10 * jax.random.normal(jax.random.key(3), (2, 8, D))
    stack = revjax.ReversibleStack(Convolution, num_layers=32, rngs=nnx.Rngs(0))
    assert stack.reconstruction_error(x).shape == (32,) and stack.reconstruction_error(x).max() == 0
    stack.exact = False
    assert stack.reconstruction_error(x)[0] > 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(coupling=revjax.Residual()), "has no inverse"),
        (dict(plan="nothin"), "A plan is"),
        (dict(plan=None), "A plan is .* but got None"),
        (dict(fraction_bits=31), "fraction_bits must be"),
        (dict(coupling=revjax.Momentum(0.9)), "no exact arithmetic.* beta = 1/2, 1/4, 1/16 and 1/256"),
    ],
)
def test_what_does_not_fit_together_is_refused_when_the_stack_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        revjax.ReversibleStack(Mixer, num_layers=2, rngs=nnx.Rngs(0), **options)


def test_a_branch_without_auxiliary_outputs_has_none():
    class Speaking(Mixer):
        def __call__(self, x):
            y = self.linear(x)
            return y, {"aux": jnp.mean(y)}

    make = lambda *branches: revjax.ReversibleStack(
        lambda rngs: [branch(rngs) for branch in branches], num_layers=2, rngs=nnx.Rngs(0)
    )
    ((silent, speaking),) = make(Mixer, Speaking).scan(X).aux
    assert silent is None and speaking.shape == (2,) and make(Mixer, Mixer).scan(X).aux is None


@pytest.mark.parametrize("key", [0, jnp.ones(2), "0", nnx.Rngs(0)], ids=["0", "floats", "text", "Rngs"])
def test_a_key_that_is_none_is_refused(key):
    with pytest.raises(TypeError, match=r"key must be a PRNG key, such as jax.random.key\(0\), but got"):
        revjax.ReversibleStack(Mixer, num_layers=2, rngs=nnx.Rngs(0))(X, key=key)


def test_booleans_and_strings_stay_what_they_are():
    class Switch(Mixer):
        def __call__(self, x, *, train=False):
            return self.linear(x) if train else 2 * self.linear(x)

    stack = revjax.ReversibleStack(Switch, num_layers=2, rngs=nnx.Rngs(0))
    assert not jnp.array_equal(stack(X, train=True), stack(X, train=False))


def test_state_that_the_loss_would_lose_is_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.stack = revjax.ReversibleStack(Mixer, num_layers=2, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.dropout(self.stack(x))

    with pytest.raises(MutatedVariableError, match="The loss writes to .*dropout.rngs.count"):
        revjax.value_and_grad(loss_fn)(Model(), X)


def test_running_statistics_outside_the_stack_are_kept_as_the_message_says():
    class Model(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(D, rngs=nnx.Rngs(1))
            self.stack = revjax.ReversibleStack(Mixer, num_layers=2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.stack(self.norm(x))

    model, plain = Model(), Model()
    with pytest.raises(MutatedVariableError, match="norm.mean.*`copy = nnx.clone.model.`.*nnx.update"):
        revjax.value_and_grad(loss_fn)(model, X)

    def loss_of_copy(model, x):
        copy = nnx.clone(model)
        return loss_fn(copy, x), nnx.state(copy, nnx.BatchStat)

    ((_, statistics), report), gradient = revjax.value_and_grad(loss_of_copy, has_aux=True)(model, X)
    nnx.update(model, statistics)
    plain(X)
    assert jnp.array_equal(model.norm.mean[...], plain.norm.mean[...]) and jnp.any(model.norm.mean[...])
    assert report.canary == 0 and report.max_abs > 0 and jnp.any(flat(gradient))


def test_a_tape_or_cache_that_no_one_takes_back_is_refused():
    class Router(Mixer):
        def __call__(self, x):
            return self.linear(x), {"tape": jnp.argmax(x, -1)}

    with pytest.raises(TypeError, match="Router returns a tape, but its __call__ does not take one back"):
        revjax.ReversibleStack(Router, num_layers=2, rngs=nnx.Rngs(0))(X)


def test_low_precision_inputs_get_gradients_of_their_own_dtype():
    stack = revjax.ReversibleStack(Mixer, num_layers=2, rngs=nnx.Rngs(0))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(stack(2 * x))))(X.astype(jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16


def test_a_coupling_may_be_its_name_and_a_block_must_not_be_made_already():
    stack = revjax.ReversibleStack(Convolution, num_layers=2, coupling="near-residual:2", rngs=nnx.Rngs(0))
    assert stack.coupling == revjax.NearResidual(2)
    with pytest.raises(TypeError, match="a function of rngs that makes a block, but got a Convolution that is made"):
        revjax.ReversibleStack(Convolution(nnx.Rngs(0)), num_layers=2, rngs=nnx.Rngs(0))


def test_a_module_that_layers_share_is_context_and_not_made_before():
    """As docs/your-own-model.md says."""
    shared = nnx.Linear(D, D, rngs=nnx.Rngs(1))

    class Holds(Mixer):
        def __init__(self, rngs):
            self.shared = shared

    with pytest.raises(ValueError, match=r"Holds holds parameters that were made before .* \(shared.bias, shared.ker"):
        revjax.ReversibleStack(Holds, num_layers=2, rngs=nnx.Rngs(0))

    class Reads(nnx.Module):
        def __init__(self, rngs):
            self.own = nnx.Param(jnp.ones(()))

        def __call__(self, x, *, context):
            return self.own[...] * context["shared"](x)

    class Model(nnx.Module):
        def __init__(self, plan):
            self.shared = nnx.Linear(D, D, rngs=nnx.Rngs(1))
            self.stack = revjax.ReversibleStack(Reads, num_layers=3, plan=plan, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.stack(x, context={"shared": self.shared})

    (_, report), gradient = revjax.value_and_grad(lambda m: jnp.mean(m(X) ** 2))(Model("nothing"))
    (_, _), expected = revjax.value_and_grad(lambda m: jnp.mean(m(X) ** 2))(Model("all"))
    assert report.canary == 0 and jnp.abs(gradient["shared"]["kernel"][...]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)


class Around(nnx.Module):
    """A model with parameters before its stack, which stands in a list."""

    def __init__(self, rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.stacks = nnx.List([revjax.ReversibleStack(Convolution, num_layers=3, rngs=rngs)])


def once(model, x):
    return jnp.mean(model.stacks[0](model.first(x)) ** 2)


def twice(model, x):
    return once(model, model.stacks[0](x))


def in_a_loop(model, x):
    return jax.lax.scan(lambda x, _: (model.stacks[0](x), None), model.first(x), None, length=2)[0].mean()


def in_a_jit(model, x):
    return jax.jit(lambda x: once(model, x))(x)


def with_a_penalty(model, x):
    return once(model, x) + sum(jnp.sum(p**2) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("loss", [once, twice, in_a_loop, in_a_jit, with_a_penalty])
def test_gradients_are_added_to_those_so_far_however_the_stack_is_called(loss):
    model = Around(nnx.Rngs(0))
    found, grads = jax.jit(revjax.value_and_grad(loss))(model, X)
    sums = jax.tree.map(lambda g: jax.random.normal(jax.random.key(g.size), g.shape), grads)
    found_too, added = jax.jit(revjax.value_and_add_grad(loss))(model, sums, X)
    assert jax.tree.structure(added) == jax.tree.structure(grads)
    for one, other in zip(jax.tree.leaves(found_too), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)
    tolerance = 0 if loss is not with_a_penalty else 1e-6  # there, three numbers are added in another order
    for new, old, grad in zip(*map(jax.tree.leaves, (added, sums, grads)), strict=True):
        np.testing.assert_allclose(new, old + grad, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(new))))


def test_a_sum_of_gradients_needs_no_room_for_those_of_one_part():
    stack = nnx.eval_shape(lambda: revjax.ReversibleStack(Convolution, num_layers=64, rngs=nnx.Rngs(0)))
    sums, loss = nnx.state(stack, nnx.Param), lambda stack, x: jnp.mean(stack(x) ** 2)

    def add_after(stack, sums, x):
        found, grads = revjax.value_and_grad(loss)(stack, x)
        return found, jax.tree.map(jnp.add, sums, grads)

    def temporary(f):
        lowered = jax.jit(f, donate_argnums=1).lower(stack, sums, X[:1, :1])
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one_copy = sum(4 * p.size for p in jax.tree.leaves(sums))
    assert temporary(add_after) > one_copy > 2 * temporary(revjax.value_and_add_grad(loss))
