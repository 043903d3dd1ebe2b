"""The time of each operation of a compiled program, as often as it ran."""

import jax
import jax.numpy as jnp
import pytest

from revjax.memory import op_times
from revjax.memory.timeline import instruction_origins


@pytest.fixture(scope="module")
def compiled():
    def f(w_L, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_L)[0])

    return jax.jit(jax.grad(f)).lower(jnp.ones((8, 256, 256)), jnp.ones((128, 256))).compile()


def test_every_call_of_an_operation_is_counted_in_its_loop(compiled, tmp_path):
    args = jnp.ones((8, 256, 256)), jnp.ones((128, 256))
    ran = []

    def step():
        jax.block_until_ready(compiled(*args))
        ran.append(None)

    times = op_times(compiled, step, steps=4, trace=tmp_path / "trace.json.gz")
    assert len(ran) == 5 and len(times.steps) == 4
    assert not {"while", "call", "conditional"} & {o.opcode for o in times.operations}
    seconds = sum(o.seconds for o in times.operations)
    assert 0 < seconds < 2 * max(times.steps)  # two threads
    in_loops = {loop: [o for o in times.operations if o.loop == loop] for loop in ("forward", "backward")}
    for operations in in_loops.values():
        assert max(o.seconds for o in operations) > 0.2 * seconds / 4
        assert all(o.calls % 8 == 0 or o.calls == 1 for o in operations)
    assert sum(sum(by_loop.values()) for by_loop in times.by_category().values()) == pytest.approx(seconds)
    assert (tmp_path / "trace.json.gz").stat().st_size > 0


def test_a_program_that_did_not_run_is_an_error(compiled):
    with pytest.raises(ValueError, match="saw no operation"):
        op_times(compiled, lambda: None, steps=1)


def test_who_asks_for_a_loop_is_not_what_it_is_for():
    lines = [
        "def step(w_L, x):",
        "    y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_L)[0]",
        "    return jnp.sort(y)",
    ]
    known = {"jax": jax, "jnp": jnp}
    exec(compile("\n".join(lines), "/somewhere/revjax/training/step.py", "exec"), known)
    compiled = jax.jit(known["step"]).lower(jnp.ones((8, 64, 64)), jnp.ones((32, 64))).compile()
    origins = [o for o in instruction_origins(compiled).values() if o.line.startswith("revjax/training/step.py")]
    assert {o.category for o in origins if o.loop} == {"other"}
    assert {o.category for o in origins if not o.loop} == {"optimizer"}
