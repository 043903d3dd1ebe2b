"""Every shipped config loads, builds its model, and says how to run it and what to expect."""

import pathlib

import pytest
from flax import nnx

from revjax.config import load
from revjax.experiment import RunConfig
from revjax.models import make_model, num_params

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
