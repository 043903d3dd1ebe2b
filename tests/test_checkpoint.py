"""A committed step comes back to the bit; anything else is an error that says which step, and what to do."""

import os
import pathlib
import random
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.checkpoint import Checkpointer
from revjax.errors import CheckpointError, DamagedCheckpointError

META = {"tokens": 4096, "loss": 0.1 + 0.2, "data": {"step": 3, "files": ["a", None]}}


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32), "b": jnp.ones(3, jnp.bfloat16)},
        "opt": {"0": {"mu": rng.normal(size=(64, 64)), "count": np.asarray(7, np.int32)}, "1": {}},
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 1 and 2."""
    with Checkpointer(tmp_path / "ck") as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, make_state(step), META)
    return tmp_path / "ck"


def test_state_and_meta_come_back_to_the_bit(saved):
    state, meta = Checkpointer(saved).restore()
    assert_same_bits(state, make_state(2))
    assert meta == META
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(state))
    assert_same_bits(Checkpointer(saved).restore(1)[0], make_state(1))


def test_a_target_gives_jax_arrays_with_its_shardings(saved):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
    target = jax.tree.map(abstract, make_state())
    target["opt"]["0"]["mu"] = np.empty((64, 64))  # numpy in, numpy out: float64 needs no jax_enable_x64
    state, _ = Checkpointer(saved).restore(target=target)
    assert_same_bits(state, make_state(2))
    assert type(state["opt"]["0"].pop("mu")) is np.ndarray
    assert all(isinstance(x, jax.Array) and x.sharding == device for x in jax.tree.leaves(state))


def test_float64_that_jax_would_round_is_an_error(saved):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state())
    with pytest.raises(
        CheckpointError, match="'opt/0/mu' .* is float64, which jax turned into float32.*jax_enable_x64"
    ):
        Checkpointer(saved).restore(target=target)


def test_arrays_may_be_changed_or_donated_once_save_returns(tmp_path):
    state, expected = make_state(), make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        state["opt"]["0"]["mu"][:] = 0
        jax.jit(lambda w: w + 1, donate_argnums=0)(state["params"]["w"]).block_until_ready()
    assert_same_bits(Checkpointer(tmp_path).restore()[0], expected)


def test_steps_are_saved_and_kept_as_asked(tmp_path):
    with Checkpointer(tmp_path, every=2, keep=2) as checkpointer:
        saved = [step for step in range(1, 8) if checkpointer.save(step, {"x": np.ones(1)})]
        assert saved == [2, 4, 6]
        assert not checkpointer.should_save(7) and checkpointer.should_save(8)
        assert checkpointer.save(7, {"x": np.ones(1)}, force=True)
    assert Checkpointer(tmp_path).steps() == [6, 7]


def test_without_keep_everything_stays(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(6):
            checkpointer.save(step, {"x": np.ones(1)})
    assert Checkpointer(tmp_path).steps() == list(range(6))


def test_a_saved_step_is_left_as_it_is(saved):
    with Checkpointer(saved) as checkpointer:
        assert not checkpointer.save(2, make_state(9), force=True)
    assert_same_bits(Checkpointer(saved).restore(2)[0], make_state(2))


def test_reading_makes_no_folder(tmp_path):
    checkpointer = Checkpointer(tmp_path / "none")
    assert checkpointer.latest_step() is None and checkpointer.steps() == []
    with pytest.raises(CheckpointError, match="none, which does not exist"):
        checkpointer.restore()
    assert not (tmp_path / "none").exists()


KILLED = """
import os, signal, sys, numpy as np
from revjax.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, {"x": np.full((64, 64), 1.0)})
checkpointer.wait()
checkpointer.save(2, {"x": np.random.default_rng(0).normal(size=(4000, 4000))})  # a second of compression
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_save_is_no_step_and_the_next_run_cleans_it_up(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [p.name for p in tmp_path.glob("2*")] == ["2.orbax-checkpoint-tmp"]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1 and (checkpointer.restore()[0]["x"] == 1).all()
        assert list(tmp_path.glob("*tmp*"))  # a reader cleans nothing: it may be another process's save
        assert checkpointer.save(2, {"x": np.ones(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


# Damage.


def truncate(data, rng):
    return data[: len(data) // 2]


def empty(data, rng):
    return b""


def noise(data, rng):
    return rng.randbytes(len(data))


def flip(data, rng):
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


@pytest.mark.parametrize("damage", [truncate, empty, noise, flip, None])
def test_a_damaged_file_never_gives_other_values(saved, damage):
    """Whichever file is hit: the very values and meta, or an error. Tensorstore alone misses flipped bits."""
    rng, errors = random.Random(0), 0
    for path in sorted(p for p in (saved / "2").rglob("*") if p.is_file()):
        before = path.read_bytes()
        path.write_bytes(damage(before, rng)) if damage else path.unlink()
        try:
            state, meta = Checkpointer(saved).restore()
        except CheckpointError as e:
            errors += 1
            assert f"{saved / '2'} is damaged" in str(e) and "Delete that folder and restore step 1." in str(e)
        else:
            assert_same_bits(state, make_state(2))
            assert meta == META
        path.write_bytes(before)
    assert errors >= 3  # the meta data, the tree, the values
    assert_same_bits(Checkpointer(saved).restore()[0], make_state(2))


def test_a_step_that_another_process_deletes_meanwhile_gives_way_to_its_newer_one(saved, monkeypatch):
    """Whoever reads a run that is being trained: only the latest few checkpoints stay."""
    reader, restore = Checkpointer(saved), Checkpointer.restore

    def slow(self, step=None, target=None):
        if step == 2:
            (saved / "2").rename(saved / "3")
        return restore(self, step, target)

    monkeypatch.setattr(Checkpointer, "restore", slow)
    state, _, damaged = reader.restore_latest()
    assert damaged == {} and not (saved / "2").exists()
    assert_same_bits(state, make_state(2))


@pytest.mark.parametrize("child", ["state", "state/d", "state/_METADATA", "_CHECKPOINT_METADATA"])
def test_a_lost_part_is_damage(saved, child):
    (saved / "2" / child).rename(saved / "lost")
    with pytest.raises(CheckpointError, match="is damaged.*restore step 1"):
        Checkpointer(saved).restore()


def test_the_only_step_being_damaged_says_so(tmp_path):
    (tmp_path / "3").mkdir()
    with pytest.raises(CheckpointError, match="3 is damaged.*start again: it is the only one"):
        Checkpointer(tmp_path).restore()


def test_a_damaged_latest_step_gives_way_to_the_one_before_and_can_be_saved_again(saved):
    (saved / "2" / "state" / "d").rename(saved / "lost")
    checkpointer = Checkpointer(saved)
    state, meta, damaged = checkpointer.restore_latest()
    assert_same_bits(state, make_state(1))
    assert list(damaged) == [2] and "is damaged" in str(damaged[2])
    aside = checkpointer.set_aside(2)
    assert aside.name == "2.damaged-0" and checkpointer.steps() == [1]
    with checkpointer:
        assert checkpointer.save(2, make_state(2), META, force=True)
    assert_same_bits(Checkpointer(saved).restore_latest()[0], make_state(2))


def test_where_every_step_is_damaged_all_are_named(saved):
    for step in ("1", "2"):
        (saved / step / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"No checkpoint in .*ck is whole: 2 \(.*\); 1 \(.*Start again"):
        Checkpointer(saved).restore_latest()


def test_a_file_that_grows_too_large_leaves_the_last_good_step_and_nothing_half_written(tmp_path):
    """As on a full disk: a process of its own, which may not write files as large as the second state needs."""
    program = """
import resource, signal, sys
import numpy as np
from revjax.checkpoint import Checkpointer
from revjax.errors import CheckpointError
noise = lambda n: {"x": np.random.default_rng(0).integers(0, 2**32, n, np.uint32)}
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, noise(100))
    checkpointer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        checkpointer.save(2, noise(1_000_000))
        checkpointer.wait()
    except CheckpointError as e:
        print(e)
    checkpointer.save(3, noise(100))
"""
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Step 2 could not be saved" in done.stdout and "the latest is step 1" in done.stdout
    assert "File too large" in done.stdout and "Traceback" not in done.stderr
    assert Checkpointer(tmp_path).steps() == [1, 3] and not [p for p in tmp_path.iterdir() if "tmp" in p.name]


# Mistakes.


def test_a_step_that_is_not_there_lists_those_that_are(saved):
    with pytest.raises(CheckpointError, match="no step 7 in .*ck: it has 1, 2"):
        Checkpointer(saved).restore(7)


def without_opt(state):
    del state["opt"]


def other_shape(state):
    state["params"]["w"] = jnp.ones((64, 32))


def other_dtype(state):
    state["params"]["b"] = jnp.ones(3)


def one_more(state):
    state["params"]["c"] = jnp.ones(3)


@pytest.mark.parametrize(
    "change, message",
    [
        (without_opt, "opt/0/count is there, but is not wanted; opt/0/mu is there"),
        (other_shape, r"params/w is float32\[64, 64\], wanted float32\[64, 32\]"),
        (other_dtype, r"params/b is bfloat16\[3\], wanted float32\[3\]"),
        (one_more, "params/c is not there"),
    ],
)
def test_a_target_that_does_not_fit_names_what_differs(saved, change, message):
    target = make_state()
    change(target)
    with pytest.raises(CheckpointError, match=f"does not fit: {message}"):
        Checkpointer(saved).restore(target=target)


@pytest.mark.parametrize(
    "state, message",
    [
        (np.ones(3), "The state must be a dict, but got ndarray"),
        ({"a": {"b": 3.0}}, r"state\['a/b'\] must be a dict or an array, but got float: wrap it"),
        ({"a": [np.ones(3)]}, r"state\['a'\] must be a dict or an array, but got list: use nested dicts"),
        ({"a": None}, "got NoneType"),
        ({"a": {1: np.ones(3)}}, r"state\['a'\] has the key 1, but keys must be strings"),
        ({"a/b": np.ones(3)}, "The state has the key 'a/b'"),
        ({"a": jax.random.key(0)}, "save jax.random.key_data"),
        ({"a": np.ones((0, 3))}, r"is empty \(shape \(0, 3\)\)"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        Checkpointer(tmp_path / "ck").save(1, state)
    assert not (tmp_path / "ck").exists()


def test_meta_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="meta must be what JSON can hold"):
        Checkpointer(tmp_path).save(1, {"x": np.ones(1)}, {"x": np.ones(1)})


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file, but checkpoints need a folder"):
        Checkpointer(tmp_path / "file")
    with pytest.raises(CheckpointError, match="Cannot keep checkpoints in .*file/ck"):
        Checkpointer(tmp_path / "file" / "ck").save(1, {"x": np.ones(1)})


@pytest.mark.parametrize("arguments", [{"every": 0}, {"keep": 0}])
def test_every_and_keep_are_positive(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        Checkpointer(tmp_path, **arguments)


def test_a_step_that_vanishes_while_it_is_written_is_not_saved(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"x": np.ones(1)})
    monkeypatch.setattr(pathlib.Path, "iterdir", lambda path: iter(()))
    with pytest.raises(CheckpointError, match="Step 1 was written, but is not in"):
        checkpointer.wait()
    checkpointer.close()
