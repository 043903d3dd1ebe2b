"""The benchmark command keeps its rows, goes on where it was, and refuses what it does not know."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.benchmarking import SUITES, GradientsConfig, MemoryConfig, gradients, memory, plot_frontier, run_suite
from revjax.benchmarking.cost import cost, draw
from revjax.benchmarking.gradients import distance, unequal
from revjax.benchmarking.memory import AttentionConfig, KeptConfig, TrainStepConfig, attention, kept, train_step
from revjax.benchmarking.peers import PeerConfig, peer
from revjax.benchmarking.planning import PlanningConfig, planning
from revjax.benchmarking.rivals import gradient_of, rival, ways
from revjax.cli import main
from revjax.errors import RevjaxError
from revjax.memory import RIVALS
from revjax.models import Decoder, DecoderConfig

TINY = MemoryConfig(num_layers=2, d_model=64, sequence_length=16, batch_size=1)


def test_a_suite_keeps_its_rows_and_does_not_measure_them_again(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setitem(SUITES, "memory", (lambda config: measured.append(config) or memory(config), [TINY]))
    (row,) = run_suite("memory", tmp_path)
    assert row["reversible"] > 0 and row["checkpoint"] > 0 and row["stored"] > 0
    assert json.loads((tmp_path / "memory.jsonl").read_text()) == row
    assert list(run_suite("memory", tmp_path)) == [row] and len(measured) == 1


def test_an_unknown_suite_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "sped"]) == 2
    assert "Did you mean 'speed'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["benchmark", "memory", f"--folder={tmp_path}/file/x"]) == 2
    assert "x/memory.jsonl: Not a directory. Give another folder: --folder=" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU cannot")
def test_a_suite_for_a_gpu_says_so(capsys, tmp_path):
    assert main(["benchmark", "accelerator", f"--folder={tmp_path}"]) == 2
    assert "needs a GPU or a TPU" in capsys.readouterr().err and not (tmp_path / "accelerator.jsonl").read_text()


def test_the_offloaded_rival_moves_what_enters_a_layer_to_the_host():
    """As lowered for a GPU, which need not be here."""
    config = DecoderConfig(d_model=64, num_layers=4, num_heads=2)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    traced = jax.jit(gradient_of("offload")).trace(model, jax.ShapeDtypeStruct((2, 64), jnp.int32))
    assert "pinned_host" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_rival_dots_keeps_the_results_of_products():
    config = DecoderConfig(d_model=64, num_layers=4, num_heads=2)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    products = lambda way: jax.jit(gradient_of(way)).lower(model, tokens).as_text().count("dot_general")
    assert products("dots") == products("stored") < products("checkpoint")


def test_plans_and_rivals_are_drawn(tmp_path, monkeypatch, capsys):
    shape = dict(num_layers=2, d_model=64, sequence_length=64, batch_size=1, vocab_size=64, dtype="float32")
    measured = lambda config: {"bytes": 10**9 + len(config.way), "seconds": 1.0}
    monkeypatch.setitem(SUITES, "rivals", (measured, ways(**shape)))
    assert main(["benchmark", "rivals", f"--folder={tmp_path}"]) == 0
    assert (tmp_path / "rivals.png").stat().st_size > 10_000 and len(capsys.readouterr().out.splitlines()) == 8
    rows = [json.loads(line) | {"seconds": None} for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    plot_frontier(rows, tmp_path / "nothing.png", title="a device on which nothing fits")
    assert not (tmp_path / "nothing.png").exists()
    paired = [
        row | {"seconds": i, "to_nothing": 1, "to_nothing_low": 0.9, "to_nothing_high": 9} for i, row in enumerate(rows)
    ]
    for name, given in {"paired": paired, "later": [row | {"seconds": 5} for row in paired]}.items():
        plot_frontier(given, tmp_path / f"{name}.png", title="")
    assert (tmp_path / "paired.png").read_bytes() == (tmp_path / "later.png").read_bytes()  # not of other minutes


@pytest.mark.slow
def test_gradients_are_compared_with_the_stored_run_and_its_own_floor():
    sizes = dict(num_layers=2, d_model=32, sequence_length=16, batch_size=1)
    row = gradients(GradientsConfig(coupling="near-residual:1", dtype="bfloat16", **sizes))
    assert row["to_stored"] == row["to_stored_unequal"] == row["canary"] == 0 and row["losses_equal"] == 1
    a, b = {"w": np.array([1.0, 2.0])}, {"w": np.array([1.0, 4.0])}
    assert unequal(a, b) == 0.5 and distance(a, b) > 0.4


@pytest.mark.slow
def test_every_way_to_a_gradient_is_measured_and_counted_costs_stand_beside_compiled_ones():
    shape = dict(num_layers=4, d_model=64, sequence_length=64, batch_size=1, vocab_size=64, dtype="float32")
    rows = {config.way: rival(dataclasses.replace(config, pairs=1)) for config in ways(**shape)}
    assert set(rows) == {"revjax nothing", "revjax attention", "revjax all", *RIVALS}
    assert rows["stored"]["bytes"] > rows["checkpoint"]["bytes"] and all(row["to_nothing"] > 0 for row in rows.values())
    first, again = draw(7, 3), draw(7, 3)
    assert first == again != draw(8, 3)
    row = cost(dataclasses.replace(first[0], num_layers=2, sequence_length=128, vocab_size=256, batch_size=1))
    assert row["off"] == row["counted"] / row["compiled"] - 1 and row["gradients"] < row["compiled"]


@pytest.mark.slow
def test_a_training_step_holds_more_than_its_gradient_and_attention_grows_with_its_length():
    row = train_step(TrainStepConfig(num_layers=2, d_model=64, sequence_length=16, batch_size=1))
    assert row["temporary"] > row["parameters"] > 0
    short, long = (attention(AttentionConfig(sequence_length=t))["temporary"] for t in (1024, 2048))
    assert short < long < 3 * short


@pytest.mark.slow
def test_what_a_coupling_keeps_is_what_memory_grows_by_with_depth():
    # In fp32: a CPU makes a wide copy of what `jax.checkpoint` keeps in bf16.
    sizes = dict(num_layers=4, d_model=64, sequence_length=64, batch_size=2, dtype="float32")
    nothing, near, bdia = (kept(KeptConfig(coupling=c, **sizes)) for c in ("revnet", "near-residual:4", "bdia:4"))
    assert abs(nothing["reversible"]) < 0.1 * near["reversible"]
    assert bdia["reversible"] == pytest.approx(near["reversible"], rel=0.1)  # as it trains, not as it is evaluated
    assert near["reversible"] == pytest.approx(2 * 64 * 4 / 8, rel=0.1)  # two f's, 4 bits of each channel
    assert near["checkpoint"] == pytest.approx(4 * 64, rel=0.1) and near["stored"] > 5 * near["checkpoint"]


@pytest.mark.slow
def test_what_a_planner_would_choose_stands_beside_the_fastest_step_that_fits():
    sizes = dict(num_layers=2, d_model=32, sequence_length=32, batch_size=2, vocab_size=64, dtype="float32")
    row = planning(PlanningConfig(**sizes, steps=3, budgets=4, pairs=1))
    assert 0 <= row["mean_regret"] <= row["worst_regret"] and 1 <= row["most_compiled"] <= 3
    assert 0 <= row["mean_regret_by_the_clock"] <= row["worst_regret_by_the_clock"] <= row["worst_regret"]
    assert 1 <= row["most_timed"] <= 3
    assert len(row["steps"]) == 3 and all(step["bytes"] > 0 and step["time"] > 0 for step in row["steps"])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")
def test_a_process_of_revjax_alone_tells_its_time_its_growth_and_its_error():
    shape = dict(num_layers=2, d_model=64, sequence_length=256, batch_size=1, repeats=1, turns=1)
    row = peer(PeerConfig(peer="revjax", **shape))
    streams = 256 * 64 * 4
    assert row["bytes"] > 4 * streams and row["seconds"] > 0 and row["error"] == 0


def test_a_peer_that_fails_says_why():
    with pytest.raises(RevjaxError, match="revjax failed: (?s:.*)num_layers must be at least 1"):
        peer(PeerConfig(peer="revjax", num_layers=0, d_model=64, sequence_length=8, batch_size=1))
