"""A run that is stopped, by anything and at any moment, ends as if it had never been stopped."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from revjax.checkpoint import Checkpointer
from revjax.training import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", "4"))  # of the test that kills at random moments
OF_THE_MACHINE = {"time", "tokens_per_second", "data_wait_s", "host_bytes"}

# Trains by the settings of the command line; when step AT is about to begin, the process gets the signal.
DRIVER = """
import dataclasses, os, sys
from revjax import experiment
from revjax.config import load
at, number = int(sys.argv[1]), int(sys.argv[2])
ready = experiment.build(load(experiment.RunConfig, (), sys.argv[3:], environ={}))
def step(state, batch):
    if int(state.step) == at:
        os.kill(os.getpid(), number)
    return ready.train_step(state, batch)
raise SystemExit(experiment.run(dataclasses.replace(ready, train_step=step)).exit_code)
"""


@pytest.fixture
def settings(tmp_path):
    rows, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    rows.write_text("".join(json.dumps({"text": f"{i} squared is {i * i}." * (i % 4)}) + "\n" for i in range(2000)))
    text.write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(500)))
    return [
        f"--data.source={{{rows}: 2, {text}: 1}}",  # a mixture; several documents in a row
        f"--data.cache={tmp_path / 'tokens'}",
        f"--run.folder={tmp_path}",
        "--data.sequence_length=32",
        "--data.batch_size=4",
        "--model.d_model=32",
        "--model.num_layers=2",
        "--model.num_heads=2",
        "--model.dropout=0.1",
        "--model.stochastic_depth=0.1",
        "--memory.plan=nothing",
        "--memory.accumulation=2",
        "--optimizer.warmup_steps=5",
        "--training.steps=40",
        "--training.eval_every=8",
        "--training.eval_batches=2",
        "--training.checkpoint_every=5",
        "--training.ema_decay=0.9",
        "--training.spike_sigmas=8",
        "--training.sample_tokens=8",
    ]


def train(settings, *, at=-1, number=0) -> int:
    command = [sys.executable, "-c", DRIVER, str(at), str(number), *settings]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL, 143), done.stderr
    return done.returncode


def lines(folder, name):
    kept = [
        {k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in read_metrics(folder / f"{name}.jsonl")
    ]
    return json.dumps(kept)


def assert_same_run(a, b):
    (state, meta), (other, other_meta) = (Checkpointer(folder / "checkpoints").restore() for folder in (a, b))
    assert meta["data"] == other_meta["data"] and meta["step"] == other_meta["step"]
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), state, other)
    assert all(jax.tree.leaves(same)), same
    for name in ("metrics", "validation"):
        assert lines(a, name) == lines(b, name)


@pytest.mark.slow
def test_forty_steps_are_thirteen_killed_nine_terminated_and_the_rest(settings, tmp_path):
    """Dropout, accumulation, a running mean: parameters, optimizer, metrics and the order of data, to the bit."""
    assert train([*settings, "--run.name=straight"]) == 0
    assert train([*settings, "--run.name=stopped"], at=13, number=signal.SIGKILL) == -signal.SIGKILL
    assert train([*settings, "--run.name=stopped"], at=22, number=signal.SIGTERM) == 143
    assert Checkpointer(tmp_path / "stopped" / "checkpoints").latest_step() == 23  # the step was finished, and saved
    assert train([*settings, "--run.name=stopped"]) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert (tmp_path / "straight" / "sample.txt").read_text() == (tmp_path / "stopped" / "sample.txt").read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_is_never_lost(settings, tmp_path):
    """It saves at every step, so that it is killed while it saves."""
    settings = [*settings, "--training.checkpoint_every=1", "--training.steps=100000", "--run.name=killed"]
    command = [sys.executable, "-c", DRIVER, "-1", "0", *settings]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    folder, rng, reached, during_a_save = tmp_path / "killed", random.Random(0), -1, 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 200
        while Checkpointer(folder / "checkpoints").latest_step() in (None, reached) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        during_a_save += any("orbax-checkpoint-tmp" in p.name for p in (folder / "checkpoints").iterdir())
        state, meta, damaged = Checkpointer(folder / "checkpoints").restore_latest()
        assert not damaged and int(state["step"]) == meta["step"] == meta["data"]["step"] > reached
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state["params"]))
        reached = meta["step"]
    print(f"{KILLS} kills, {during_a_save} of them during a save; reached step {reached}")
    assert during_a_save or KILLS < 4
