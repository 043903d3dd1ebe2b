"""The loop reads one step late, tells loudly what went wrong, and always ends with a checkpoint that continues."""

import errno
import json
import logging
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from revjax.checkpoint import Checkpointer
from revjax.data import Batches
from revjax.errors import CheckpointError
from revjax.logging import get_logger
from revjax.models.stack import ReversibleStack
from revjax.training import (
    MetricsLog,
    StopRequest,
    TensorBoard,
    TrainingConfig,
    Work,
    init_state,
    make_train_step,
    means,
    plot_losses,
    read_metrics,
    rewinds_to,
    split,
    train,
)

from ..data.texts import make_corpus, make_text

TOKENS = np.random.default_rng(0).integers(1, 255, 4000).astype(np.uint8)
NAN, OVERFLOW = 255, 0  # a batch that begins with this


class Branch(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        return x @ self.kernel[...]


def make_batches():
    return Batches(make_corpus(make_text(TOKENS)), batch_size=4, sequence_length=8, seed=0, separate_documents=False)


def loss(model, batch, key):
    rows = batch["tokens"]
    first = rows[0, 0]
    scale = jnp.where(first == OVERFLOW, 1e6, 1.0) * jnp.where(first == NAN, jnp.nan, 1.0)
    x = rows[:, :8].astype(jnp.float32)[:, None] / 255 * scale
    return jnp.sum((model(x) - 1) ** 2), jnp.float32(rows.shape[0])


@pytest.fixture(scope="module")
def parts():
    skeleton, params = split(ReversibleStack(Branch, num_layers=2, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)
    steps = {
        how: jax.jit(make_train_step(skeleton, loss, optimizer, on_trouble=how))
        for how in ("warn", "skip", "rewind", "stop")
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


def held_out(loss):
    return {"loss": loss, "bits_per_byte": loss / np.log(2)}


def run(
    folder,
    parts,
    *,
    before_step=lambda i, row: row,
    evaluate=lambda state: held_out(1.0 + float(state.step)),
    **settings,
):
    """Trains in `folder`, going on from its checkpoint; `before_step` may change what step i gets, or raise."""
    skeleton, steps, state = parts
    config = TrainingConfig(**({"steps": 10, "eval_every": 4, "checkpoint_every": 5} | settings))
    rows = make_batches()
    checkpointer = Checkpointer(folder / "checkpoints", every=config.checkpoint_every, keep=2)
    if checkpointer.latest_step() is not None:
        nested, meta = checkpointer.restore(target=state.as_dict())
        rewinds = rewinds_to(folder, meta["step"])
        rows.restore(rewinds[-1]["resume_data"] if rewinds else meta["data"])
        state = state.from_dict(nested)
    step = lambda state, batch: steps[config.on_trouble](
        state, {"tokens": before_step(int(state.step), batch["tokens"])}
    )
    with checkpointer, MetricsLog(folder, start_step=int(state.step)) as log, StopRequest() as request:
        return train(
            state,
            step,
            rows,
            config=config,
            skeleton=skeleton,
            evaluate=evaluate,
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
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


def begins_with(value):
    """A batch of these tokens begins with `value`: the same one whenever it comes."""

    def before_step(i, row):
        row = row.copy()
        row[0, 0] = NAN if row[0, 1] == value else 1
        return row

    return before_step


def test_rewind_goes_back_and_on_without_the_batch(tmp_path, parts, told):
    rows = make_batches()
    bad = begins_with(rows.batch(7)["tokens"][0, 1])
    outcome = run(tmp_path, parts, before_step=bad, on_trouble="rewind")
    assert outcome.ended == "finished" and int(outcome.state.step) == 10 and int(outcome.state.skipped) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11)) and None not in [line["loss"] for line in lines]
    (line,) = read_metrics(tmp_path / "trouble.jsonl")
    assert (line["step"], line["to_step"], line["batch"]["step"], line["resume_data"]["step"]) == (8, 5, 7, 8)
    assert line["batch"] == rows.state() | {"step": 7}  # it can be had again
    assert any("back to the checkpoint of step 5" in line for line in told)
    # The steps after 5 are those of a run whose batches go from the fifth to the ninth.
    skeleton, steps, state = parts
    for i in (0, 1, 2, 3, 4, 8, 9, 10, 11, 12):
        state, _ = steps["rewind"](state, {"tokens": bad(i, rows.batch(i)["tokens"])})
    assert same_bits(outcome.state, state)


@pytest.mark.parametrize("at", [3, 8, 9])
def test_a_run_that_went_back_resumes_as_if_it_had_not_been_stopped(tmp_path, parts, at):
    """Killed after the rewind and before the next checkpoint: the batch does not come again."""
    bad = begins_with(make_batches().batch(2)["tokens"][0, 1])
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    settings = {"on_trouble": "rewind", "checkpoint_every": 20, "steps": 12}
    straight = run(tmp_path / "a", parts, before_step=bad, **settings)
    calls = []

    def killed(i, row):
        calls.append(i)
        if len(calls) == at + 4:
            raise RuntimeError("power cut")
        return bad(i, row)

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "b", parts, before_step=killed, **settings)
    assert same_bits(run(tmp_path / "b", parts, before_step=bad, **settings).state, straight.state)
    troubles = [read_metrics(tmp_path / name / "trouble.jsonl") for name in "ab"]
    assert troubles[0] == troubles[1] and len(troubles[0]) == 1


def test_rewind_goes_past_a_checkpoint_that_is_damaged(tmp_path, parts, told):
    latest = tmp_path / "checkpoints" / "5"

    def damages_and_spoils(i, row):
        if i != 7 or (tmp_path / "trouble.jsonl").stat().st_size:
            return row
        while not latest.exists():  # it is being written
            time.sleep(0.01)
        for path in (path for path in latest.rglob("*") if path.is_file()):
            path.write_bytes(path.read_bytes()[:-1])
        return spoil(7, NAN)(i, row)

    outcome = run(tmp_path, parts, before_step=damages_and_spoils, on_trouble="rewind")
    assert outcome.ended == "finished" and int(outcome.state.step) == 10
    (line,) = read_metrics(tmp_path / "trouble.jsonl")
    assert (line["step"], line["to_step"], line["resume_data"]["step"]) == (8, 0, 8)
    assert any("5 is damaged" in line and "5.damaged-0" in line for line in told)


def test_rewinding_ends_when_it_does_not_help(tmp_path, parts, told):
    outcome = run(
        tmp_path, parts, before_step=lambda i, row: spoil(i, NAN)(i, row) if i >= 6 else row, on_trouble="rewind"
    )
    assert outcome.ended == "stopped" and int(outcome.state.step) == 5
    assert any("went back to step 5 3 times already" in line for line in told)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome.state.params))


def test_a_run_that_skips_a_hundred_updates_in_a_row_ends(tmp_path, parts, told):
    never_again = lambda i, row: np.concatenate([np.full_like(row[:, :1], NAN if i < 150 else 1), row[:, 1:]], axis=1)
    outcome = run(tmp_path, parts, before_step=never_again, steps=300)
    assert outcome.ended == "stopped" and int(outcome.state.skipped) in (100, 101)  # the next one has begun
    assert any("100 updates in a row were left out" in line for line in told)
    (tmp_path / "b").mkdir()
    now_and_then = lambda i, row: never_again(0 if i % 99 else 200, row)
    assert run(tmp_path / "b", parts, before_step=now_and_then, steps=250).ended == "finished"


def test_every_trouble_is_written_down_with_its_batch(tmp_path, parts):
    run(tmp_path, parts, before_step=spoil(4, NAN))
    (line,) = read_metrics(tmp_path / "trouble.jsonl")
    assert (
        line["step"] == 5 and line["batch"]["step"] == 4 and line["loss"] is None and "The loss is nan" in line["what"]
    )


def test_the_first_evaluation_says_that_it_compiles(tmp_path, parts, told):
    run(tmp_path, parts)
    looks = [line for line in told if "valuation" in line or "validation" in line]
    assert looks[0] == "step 0: the first evaluation, which compiles its own program"
    assert looks[1].startswith("step 0: validation") and not any("compiles" in line for line in looks[1:])


def test_an_evaluation_that_was_interrupted_is_made_on_resume(tmp_path, parts):
    def interrupted(state):
        if int(state.step) == 8:
            signal.raise_signal(signal.SIGTERM)
            return None  # as `means` does
        return held_out(1.0 + float(state.step))

    outcome = run(tmp_path, parts, evaluate=interrupted)
    assert outcome.ended == "interrupted" and int(outcome.state.step) == 8
    assert [line["step"] for line in read_metrics(tmp_path / "validation.jsonl")] == [0, 4]
    run(tmp_path, parts)
    assert [line["step"] for line in read_metrics(tmp_path / "validation.jsonl")] == [0, 4, 8, 10]


def test_means_are_of_all_batches_and_can_be_interrupted():
    seen = []
    step = lambda params, batch: (seen.append(batch), (batch, 2.0))[1]
    assert means(step, None, [1.0, 3.0]) == ({"loss": 1.0}, 4.0)
    assert means(step, None, [1.0, 3.0, 5.0], stop=lambda: len(seen) == 4) is None
    with_more = lambda params, batch: (batch, batch, {"accuracy": 0.5 * batch})
    assert means(with_more, None, [1.0, 3.0]) == ({"loss": 1.0, "accuracy": 0.5}, 4.0)


def test_the_best_and_every_third_checkpoint_stay(tmp_path, parts):
    losses = {2: 5.0, 4: 1.0, 6: 4.0, 8: 3.0, 10: 2.0}
    skeleton, steps, state = parts
    config = TrainingConfig(steps=10, eval_every=2, checkpoint_every=2)
    rows = make_batches()
    with (
        Checkpointer(tmp_path / "checkpoints", every=2, keep=1, keep_every=6, keep_best=2) as checkpointer,
        MetricsLog(tmp_path) as log,
        StopRequest() as request,
    ):
        train(
            state,
            steps["skip"],
            rows,
            config=config,
            skeleton=skeleton,
            evaluate=lambda state: held_out(losses.get(int(state.step), 9.0)),
            checkpointer=checkpointer,
            metrics_log=log,
            stop_request=request,
        )
    assert Checkpointer(tmp_path / "checkpoints").steps() == [4, 6, 10]  # the best, every sixth, the best and latest


@pytest.mark.parametrize("on_save_error", ["continue", "stop"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_only_where_it_is_told_to(
    tmp_path, parts, told, monkeypatch, on_save_error
):
    real, failing = Checkpointer.save, {5}

    def save(self, step, *args, **options):
        if step in failing and not options.get("force"):
            raise CheckpointError(f"Step {step} could not be saved: No space left on device.")
        return real(self, step, *args, **options)

    monkeypatch.setattr(Checkpointer, "save", save)
    if on_save_error == "stop":
        with pytest.raises(CheckpointError, match="No space left"):
            run(tmp_path, parts, on_save_error=on_save_error)
    else:
        assert run(tmp_path, parts, on_save_error=on_save_error).ended == "finished"
        assert Checkpointer(tmp_path / "checkpoints").steps() == [10]
        assert any("No space left" in line and "Training goes on" in line for line in told)


def test_a_tracker_that_fails_is_dropped_and_ends_nothing(tmp_path, told):
    """A full disk, by the file that always is one."""
    board = TensorBoard(tmp_path / "board")
    board._writer.close()
    board._writer._writer = open("/dev/full", "wb")
    with MetricsLog(tmp_path, trackers=[board]) as log:
        for step in (1, 2, 3):
            log.step(step=step, loss=1.0)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(told) == 1 and told[0].startswith("TensorBoard gets no more curves: OSError: [Errno 28] No space left")


def test_tensorboard_is_told_what_comes_again(tmp_path):
    with MetricsLog(tmp_path, trackers=[TensorBoard(tmp_path / "board")]) as log:
        for step in (1, 2, 3):
            log.step(step=step, loss=1.0)
        log.go_back(1)
        log.step(step=2, loss=0.5)
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    (path,) = (tmp_path / "board").iterdir()
    data, seen = path.read_bytes(), []
    while data:  # length, checksum, event, checksum
        size = int.from_bytes(data[:8], "little")
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        seen.append((event.step, event.session_log.status == SessionLog.START))
    assert seen == [(0, False), (1, True), (1, False), (2, False), (3, False), (2, True), (2, False)]


def test_a_full_disk_keeps_lines_of_the_log_in_memory_until_they_can_be_written(tmp_path, monkeypatch, told):
    real, full = os.write, [False]

    def write(file, text):
        if full[0]:
            real(file, text[:3])  # as much as there was room for
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, text)

    monkeypatch.setattr(os, "write", write)
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            full[0] = step in (2, 3)
            log.step(step=step)
            on_disk = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
            assert on_disk == ([1] if step < 4 else list(range(1, step + 1)))
    assert len([line for line in told if "No space left on device" in line]) == 1


def test_a_stall_is_told_with_what_is_awaited(tmp_path, parts, told):
    slow = lambda i, row: time.sleep(0.5 if i == 3 else 0) or row
    run(tmp_path, parts, before_step=slow, stall_after_s=0.1)
    assert any(line.startswith("nothing has happened for 0 s: waiting for") for line in told)


def test_utilisation_is_flops_over_the_peak_it_is_taken_against():
    work = Work(tokens=100, model_flops=6e9, hardware_flops=8e9, peak_flops=1e12)
    expected = {"tokens_per_second": 5000.0, "mfu": 0.3, "hfu": 0.4, "peak_flops": 1e12}
    assert work.speeds(0.02) == expected
    assert Work(tokens=100, model_flops=6e9).speeds(0.02) == {"tokens_per_second": 5000.0}


def test_samples_on_the_way_are_lines_of_their_own(tmp_path, parts):
    skeleton, steps, state = parts
    with (
        Checkpointer(tmp_path / "checkpoints", every=5) as checkpointer,
        MetricsLog(tmp_path) as log,
        StopRequest() as request,
    ):
        train(
            state,
            steps["skip"],
            make_batches(),
            config=TrainingConfig(steps=6, sample_every=4),
            skeleton=skeleton,
            sample=lambda state: f"after {int(state.step)}",
            checkpointer=checkpointer,
            metrics_log=log,
            stop_request=request,
        )
    lines = read_metrics(tmp_path / "samples.jsonl")
    assert lines == [{"step": n, "text": f"after {n}"} for n in (0, 4, 6)]


def test_warn_goes_on_with_the_wrong_update(tmp_path, parts, told):
    outcome = run(tmp_path, parts, before_step=spoil(4, NAN), on_trouble="warn")
    assert np.isnan(jax.tree.leaves(outcome.state.params)[0]).all()
    assert len([line for line in told if "trouble again" in line]) == 1  # of 6: five are told in full


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"keep_every": 0}, "keep_every must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1"),
        ({"spike_sigmas": 0.0}, "spike_sigmas must be above 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
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
