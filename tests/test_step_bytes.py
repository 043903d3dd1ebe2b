"""A step that was compiled to see what it takes is not compiled again for the same question, and for no other one."""

import dataclasses
import logging

import pytest

from revjax import experiment
from revjax.config import load, users_cache
from revjax.experiment import RunConfig, step_bytes


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = "--data.sequence_length=32 --data.batch_size=4 --model.d_model=32 --model.num_layers=2 --mesh.data=1"
    return load(RunConfig, (), [*words.split(), "--memory.plan=auto"], environ={})


def recall(config, *, to_run=False):
    return step_bytes.recall(config, to_run=to_run)


def within(config, section, **changes):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def kept():
    return list(users_cache("step-bytes").glob("*"))


def test_the_same_question_is_answered_without_compiling(config, caplog):
    with caplog.at_level(logging.INFO, "revjax"):
        found = experiment.plan(config, "aggressive")
        assert caplog.text.count("compiling") == 1 and len(kept()) == 1
        assert experiment.plan(config, "aggressive") == found
    assert caplog.text.count("compiling") == 1 and "known from before: plan nothing, 4 micro-batches" in caplog.text


def test_only_what_is_no_part_of_a_step_may_differ(config, monkeypatch):
    step_bytes.remember(config, 123, to_run=False)
    assert recall(config) == 123
    assert (
        recall(within(config, "run", name="b", folder="other")) == recall(within(config, "memory", budget="0.5")) == 123
    )
    assert recall(config, to_run=True) is None
    assert recall(within(config, "data", sequence_length=64)) is recall(within(config, "memory", plan="all")) is None
    with monkeypatch.context() as m:
        m.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
        assert recall(config) is None
    with monkeypatch.context() as m:
        m.setattr(step_bytes, "_digest_of_package", lambda: "another")
        assert recall(config) is None
    assert recall(config) == 123


@pytest.mark.parametrize("damaged", [b"", b"\xff", b"[]", b'{"bytes": "many"}', b'{"bytes": -1}'])
def test_a_damaged_file_is_as_none(config, damaged):
    step_bytes.remember(config, 123, to_run=False)
    kept()[0].write_bytes(damaged)
    assert recall(config) is None
    step_bytes.remember(config, 124, to_run=False)
    assert recall(config) == 124 and len(kept()) == 1


def test_nothing_is_kept_of_code_of_ones_own_or_where_nothing_shall_be_cached(config, tmp_path):
    own = within(config, "model", coupling="revjax.benchmarking.couplings:alternating")
    for other in (own, within(config, "run", compilation_cache=None)):
        step_bytes.remember(other, 123, to_run=False)
        assert recall(other) is None and not kept()
    (tmp_path / "cache").write_text("a file is in the way")
    step_bytes.remember(config, 123, to_run=False)
    assert recall(config) is None
