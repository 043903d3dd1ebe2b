"""The loop reads one step late, tells loudly what went wrong, and always ends with a checkpoint that continues."""

import json
import logging
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from revjax.checkpoint import Checkpointer
from revjax.data import batches
from revjax.logging import get_logger
from revjax.models.stack import ReversibleStack
from revjax.training import (
    MetricsLog,
    StopRequest,
    TrainingConfig,
    init_state,
    make_train_step,
    plot_losses,
    read_metrics,
    split,
    train,
)

TOKENS = np.random.default_rng(0).integers(1, 255, 4000).astype(np.uint8)
NAN, OVERFLOW = 255, 0  # a batch that begins with this


class Branch(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        return x @ self.kernel[...]


def loss(model, rows, key):
    first = rows[0, 0]
    scale = jnp.where(first == OVERFLOW, 1e6, 1.0) * jnp.where(first == NAN, jnp.nan, 1.0)
    x = rows[:, :8].astype(jnp.float32)[:, None] / 255 * scale
    return jnp.sum((model(x) - 1) ** 2), jnp.float32(rows.shape[0])


@pytest.fixture(scope="module")
def parts():
    skeleton, params = split(ReversibleStack(Branch, num_layers=2, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)
    steps = {
        how: jax.jit(make_train_step(skeleton, loss, optimizer, on_trouble=how)) for how in ("warn", "skip", "stop")
    }
    return skeleton, steps, init_state(params, optimizer, jax.random.key(0))


@pytest.fixture
def told():
    """What is logged, whatever other tests have done to the logger."""
    records, handler, logger = [], logging.Handler(), get_logger()
    handler.emit = lambda record: records.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def run(folder, parts, *, before_step=lambda i, row: row, **settings):
    """Trains in `folder`, going on from its checkpoint; `before_step` may change batch i or raise."""
    skeleton, steps, state = parts
    config = TrainingConfig(**({"steps": 10, "eval_every": 4, "checkpoint_every": 5} | settings))
    rows = batches(TOKENS, batch_size=4, sequence_length=8, seed=0)
    checkpointer = Checkpointer(folder / "checkpoints", every=config.checkpoint_every, keep=2)
    if checkpointer.latest_step() is not None:
        nested, meta = checkpointer.restore(target=state.as_dict())
        rows.restore(meta["data"])
        state = state.from_dict(nested)
    step = lambda state, batch: steps[config.on_trouble](state, before_step(int(state.step), batch))
    with checkpointer, MetricsLog(folder, start_step=rows.step) as log, StopRequest() as request:
        return train(
            state,
            step,
            rows,
            config=config,
            skeleton=skeleton,
            evaluate=lambda state: 1.0 + float(state.step),
            checkpointer=checkpointer,
            metrics_log=log,
            stop_request=request,
        )


def spoil(at, value):
    def before_step(i, row):
        row = row.copy()
        row[0, 0] = value if i == at else row[0, 0]
        return row

    return before_step


def interrupt(at, how):
    def before_step(i, row):
        if i == at:
            how()
        return row

    return before_step


def same_bits(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def test_every_step_has_a_line_and_evaluations_have_their_own(tmp_path, parts):
    outcome = run(tmp_path, parts)
    assert outcome.ended == "finished" and int(outcome.state.step) == 10
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    keys = {"loss", "bits_per_byte", "grad_norm", "canary", "unsafe", "max_abs", "tokens_per_second", "time", "skipped"}
    assert all(keys <= set(line) for line in lines)
    assert lines[0]["loss"] > lines[-1]["loss"] and {line["canary"] for line in lines} == {0}
    assert [line["step"] for line in read_metrics(tmp_path / "validation.jsonl")] == [0, 4, 8, 10]
    assert Checkpointer(tmp_path / "checkpoints").steps() == [5, 10]


def test_ten_steps_are_five_and_five_to_the_bit(tmp_path, parts):
    straight = run(tmp_path / "a", parts) if (tmp_path / "a").mkdir() is None else None
    (tmp_path / "b").mkdir()

    def crash():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "b", parts, before_step=interrupt(7, crash))
    resumed = run(tmp_path / "b", parts)
    assert same_bits(resumed.state, straight.state)
    losses = [[line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 10  # steps 6 and 7 are not there twice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_with_a_checkpoint(tmp_path, parts, number, told):
    handler = signal.getsignal(number)
    outcome = run(tmp_path, parts, before_step=interrupt(2, lambda: signal.raise_signal(number)))
    assert outcome.ended == "interrupted" and outcome.signal == number and int(outcome.state.step) == 3
    assert Checkpointer(tmp_path / "checkpoints").steps() == [3]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert signal.getsignal(number) is handler
    assert any(number.name in line for line in told)
    assert run(tmp_path, parts).ended == "finished"


def test_a_second_signal_acts_as_it_always_does(tmp_path, parts):
    twice = lambda: (signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, parts, before_step=interrupt(2, twice))
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("value, words", [(NAN, "The loss is nan"), (OVERFLOW, "first in layer 0 Branch")])
def test_a_broken_step_is_skipped_and_named(tmp_path, parts, told, value, words):
    outcome = run(tmp_path, parts, before_step=spoil(4, value))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert outcome.ended == "finished" and int(outcome.state.skipped) == 1
    assert [line["skipped"] for line in lines] == [0] * 4 + [1] * 6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome.state.params))
    (complaint,) = [line for line in told if "not to be trusted" in line]
    assert complaint.startswith("step 5:") and words in complaint and "The update was left out" in complaint


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path, parts):
    run(tmp_path, parts, before_step=spoil(4, NAN))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and json.loads(text.splitlines()[4])["loss"] is None
    assert plot_losses(tmp_path, title="with a gap").stat().st_size > 1000


def test_stop_ends_with_the_last_good_state(tmp_path, parts, told):
    outcome = run(tmp_path, parts, before_step=spoil(5, NAN), on_trouble="stop")
    assert outcome.ended == "stopped" and int(outcome.state.step) == 7  # step 6 is read while 7 runs
    assert any("training ends" in line for line in told)
    state, _ = Checkpointer(tmp_path / "checkpoints").restore()
    assert same_bits(state, outcome.state.as_dict()) and int(state["skipped"]) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state["params"]))


def test_stop_also_stops_at_the_last_step_and_beside_an_evaluation(tmp_path, parts):
    for at in (9, 3, 4):  # the last step; just before an evaluation; just before a checkpoint
        (tmp_path / str(at)).mkdir()
        assert run(tmp_path / str(at), parts, before_step=spoil(at, NAN), on_trouble="stop").ended == "stopped"


def test_warn_goes_on_with_the_wrong_update(tmp_path, parts, told):
    outcome = run(tmp_path, parts, before_step=spoil(4, NAN), on_trouble="warn")
    assert np.isnan(jax.tree.leaves(outcome.state.params)[0]).all()
    assert len([line for line in told if "trouble again" in line]) == 1  # of 6: five are told in full


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"on_trouble": "rewind"}, "'rewind' comes with the training system.*'skip'.*'stop'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seed": -1}, "seed must be between"),
        ({"sample_temperature": -1.0}, "sample_temperature"),
    ],
)
def test_impossible_settings_are_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**setting)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    with MetricsLog(tmp_path, start_step=1) as log:
        log.step(step=2, loss=jnp.float32(1.5))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "loss": 1.5}]


def test_there_is_no_plot_before_the_first_step(tmp_path):
    assert plot_losses(tmp_path, title="") is None
