"""On eight devices a run sees the same data and the same bits come back; what is gathered is gathered once."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from revjax import experiment, value_and_grad
from revjax.checkpoint import Checkpointer
from revjax.config import load
from revjax.errors import ConfigError
from revjax.models import Decoder, DecoderConfig, next_token_loss
from revjax.sharding import (
    MeshConfig,
    batch_sharding,
    constrain_rows,
    gather_layer,
    make_mesh,
    shard_batch,
    spec_of,
    state_shardings,
)
from revjax.training import read_metrics, split


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(3000)))
    return path


def configure(text, folder, name, *settings):
    basic = [
        f"--run.name={name}",
        f"--run.folder={folder}",
        f"--data.source={text}",
        "--data.sequence_length=32",
        "--data.batch_size=16",
        "--model.d_model=32",
        "--model.num_layers=4",
        "--model.num_heads=2",
        "--model.dtype=float32",
        "--memory.plan=nothing",
        "--training.steps=20",
        "--training.eval_every=10",
        "--training.eval_batches=2",
        "--training.checkpoint_every=10",
        "--training.sample_prompt=",
    ]
    return load(experiment.RunConfig, (), [*basic, *settings], environ={})


ONE, MANY = ["--mesh.data=1"], ["--mesh.data=2", "--mesh.fsdp=4"]


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """On one device, there in another order of summation, and on eight: what each began with, and how it finished."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"one": ONE, "halves": [*ONE, "--memory.accumulation=2"], "many": MANY}
    began, done = {}, {}
    for name, words in settings.items():
        ready = experiment.build(configure(text, folder, name, *words))
        began[name] = jax.device_get(ready.state)
        done[name] = (ready, experiment.run(ready).outcome.state)
    return folder, began, done


def largest_difference(a, b):
    distances = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a.params, b.params)
    return max(jax.tree.leaves(distances))


def test_eight_devices_see_the_data_of_one_and_come_to_its_parameters(runs):
    folder, began, done = runs
    assert all(map(np.array_equal, jax.tree.leaves(began["one"]), jax.tree.leaves(began["many"])))
    states = {name: state for name, (_, state) in done.items()}
    assert done["many"][0].batches.state() == done["one"][0].batches.state()
    for batch in (3, 19):
        a, b = (done[name][0].batches.batch(batch)["tokens"] for name in ("one", "many"))
        np.testing.assert_array_equal(a, b)
    floor = largest_difference(states["one"], states["halves"])
    assert 0 < largest_difference(states["one"], states["many"]) <= 3 * floor
    lines = read_metrics(folder / "many" / "metrics.jsonl")
    assert len(lines) == 20 and all(line["canary"] == line["unsafe"] == 0 for line in lines)
    held_out = [[line["loss"] for line in read_metrics(folder / name / "validation.jsonl")] for name in ("one", "many")]
    np.testing.assert_allclose(*held_out, rtol=1e-5)


@pytest.mark.slow
def test_what_is_announced_of_memory_is_of_each_device(text, tmp_path):
    said = experiment.announce(experiment.build(configure(text, tmp_path, "many", *MANY), dry=True))
    alone = experiment.announce(experiment.build(configure(text, tmp_path, "one", *ONE), dry=True))
    assert said.count(" on each device ") == 2 and "on each device" not in alone


def test_state_lies_where_the_table_says_from_the_first_step_to_the_last(runs):
    _, _, done = runs
    state = done["many"][1]
    branch = state.params["stack"]["runs"]["0"]["1"]["mlp"]
    assert branch["up"]["kernel"].sharding.spec == P(None, "fsdp", None)
    assert branch["up"]["kernel"].addressable_shards[0].data.shape == (4, 8, branch["up"]["kernel"].shape[2])
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == branch["up"]["kernel"].shape]
    assert moments and all("fsdp" in x.sharding.spec for x in moments)
    assert state.step.sharding.is_fully_replicated


def test_a_run_on_eight_devices_resumes_to_the_bit_and_goes_on_on_one(runs, text, tmp_path):
    _, _, done = runs
    ready = dataclasses.replace(experiment.build(configure(text, tmp_path, "a", *MANY)))

    def dying(state, batch):
        if int(state.step) == 12:
            raise RuntimeError("power cut")
        return ready.train_step(state, batch)

    with pytest.raises(RuntimeError, match="power cut"):
        experiment.run(dataclasses.replace(ready, train_step=dying))
    shutil.copytree(tmp_path / "a", tmp_path / "copy" / "a")
    again = experiment.build(configure(text, tmp_path, "a", *MANY))
    assert again.start_step == 10
    resumed = experiment.run(again).outcome.state
    assert all(map(np.array_equal, jax.tree.leaves(resumed.params), jax.tree.leaves(done["many"][1].params)))
    on_one = experiment.run(experiment.build(configure(text, tmp_path / "copy", "a", *ONE))).outcome.state
    assert largest_difference(on_one, resumed) <= 3 * largest_difference(done["one"][1], done["halves"][1])
    assert Checkpointer(tmp_path / "copy" / "a" / "checkpoints").latest_step() == 20


def all_gathers_of_layers(mesh, coupling, plan, *, gather=True):
    """How many there are in the compiled gradient, each of which runs once a layer: (forward, backward)."""
    sharing = {"constrain": constrain_rows(mesh)} | ({"gather": gather_layer(mesh)} if gather else {})
    config = DecoderConfig(d_model=64, num_layers=8, num_heads=4, coupling=coupling, exact=coupling != "residual")
    skeleton, params = split(nnx.eval_shape(lambda: Decoder(config, plan=plan, **sharing, rngs=nnx.Rngs(0))))
    placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(placed, params, state_shardings(params, mesh))
    tokens = jax.ShapeDtypeStruct((16, 65), jnp.int32, sharding=batch_sharding((16, 65), mesh))

    def gradient(params, tokens):
        loss = lambda model: jnp.divide(*next_token_loss(model, {"tokens": tokens}, None))
        (_, report), grads = value_and_grad(loss)(skeleton.merge(params))
        return report.canary, jax.tree.leaves(grads)

    text = jax.jit(gradient).lower(params, tokens).compile().as_text()
    names = re.findall(r"= \S+ all-gather(?:-start)?\(.*op_name=\"([^\"]*)\"", text)
    layers = [name for name in names if "while" in name and "btv" not in name and "btd" not in name]
    backward = [name for name in layers if "transpose" in name]
    return len(layers) - len(backward), len(backward)


def test_the_backward_pass_gathers_a_layer_once_as_that_of_checkpointing_does():
    mesh = make_mesh(MeshConfig(fsdp=4))
    reversible = all_gathers_of_layers(mesh, "revnet", "nothing")
    assert reversible == (7, 7)  # query, key, value, out; up, gate, down
    assert reversible[1] <= all_gathers_of_layers(mesh, "residual", "inputs")[1]
    assert reversible[1] < all_gathers_of_layers(mesh, "revnet", "nothing", gather=False)[1]


def test_rules_cut_what_divides_and_leave_the_rest_whole():
    mesh = make_mesh(MeshConfig(fsdp=4))
    assert mesh.shape == {"data": 2, "fsdp": 4}
    assert spec_of("stack/runs/0/0/attention/query/kernel", (6, 128, 4, 32), mesh) == P(None, "fsdp", None, None)
    assert spec_of("stack/runs/0/0/attention/query/kernel", (6, 126, 4, 32), mesh) == P(None, None, None, None)
    assert spec_of("opt_state/1/mu/embedding/table", (256, 64), mesh) == P("fsdp", None)
    assert spec_of("opt_state/1/v_row/embedding/table", (256,), mesh) == P()  # a factored moment
    assert spec_of("stack/runs/0/0/norm/scale", (6, 128), mesh) == P()


def test_a_batch_is_dealt_out_where_it_divides():
    mesh = make_mesh(MeshConfig(fsdp=4))
    batch = shard_batch({"tokens": np.zeros((16, 5)), "few": np.zeros((3, 5))}, mesh)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 5)}
    assert batch["few"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--mesh.data=4", "--mesh.fsdp=4"], "mesh.data=4 times mesh.fsdp=4 needs 16 devices, but there are 8"),
        (["--data.batch_size=12"], "8 devices share the 12 rows .* Set --data.batch_size=8, or --mesh.data=1"),
        (["--memory.accumulation=4"], "8 devices share the 4 rows .* Set --data.batch_size=32"),
        (["--mesh.fsdp=0"], "fsdp must be at least 1, but got 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        experiment.build(configure(text, tmp_path, "a", *settings))
