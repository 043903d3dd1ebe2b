"""Every shipped config loads, builds its model, and says how to run it and what to expect."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from revjax.config import load
from revjax.experiment import RunConfig
from revjax.models import ModelConfig, example_batch, loss_of, make_model, num_params, value_and_grad

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert {"quickstart.yaml", "tiny.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_loads_and_its_model_builds(path):
    config = load(RunConfig, path, environ={})
    model = nnx.eval_shape(lambda: make_model(config.model, plan=config.memory.plan, rngs=nnx.Rngs(0)))
    assert num_params(model) > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_its_run_is_named_after_it(path):
    assert load(RunConfig, path, environ={}).run.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_its_header_gives_command_hardware_and_result(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for words in (f"python scripts/train.py configs/{path.name}", "Hardware:", "Expected:"):
        assert words in header


def small_models() -> dict[str, ModelConfig]:
    """That of each config, made narrow and shallow: a billion parameters do not fit a test. Each kind once."""
    sizes = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128, "vocab_size": 260}
    found: dict[str, ModelConfig] = {}
    for path in CONFIGS:
        model = load(RunConfig, path, environ={}).model
        small = [f"--model.{name}={size}" for name, size in sizes.items() if hasattr(model, name)]
        model = load(RunConfig, path, small, environ={}).model
        if model not in found.values():
            found[path.stem] = model
    return found


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("config", [pytest.param(model, id=name) for name, model in small_models().items()])
def test_the_model_of_every_config_is_rebuilt_to_the_bit(config):
    model = make_model(config, plan="nothing", rngs=nnx.Rngs(0))
    shapes, key = example_batch(config, 2, 64), jax.random.key(0)
    most = min(10, getattr(config, "vocab_size", 10))
    batch = {name: jax.random.randint(key, x.shape, 0, most).astype(x.dtype) for name, x in shapes.items()}
    loss = lambda model: jnp.divide(*loss_of(config)(model, batch, key)[:2])
    (value, report), grads = jax.jit(value_and_grad(loss))(model)
    assert report.canary == report.unsafe == 0, report.describe(model)
    assert jnp.isfinite(value) and all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(grads))
