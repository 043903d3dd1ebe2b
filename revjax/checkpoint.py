"""Saves and restores plain nested dicts of arrays, over Orbax.

A step counts as saved once it is committed: it is written under a temporary name, checked, and renamed in
one operation. So a process that is killed leaves the last committed step as it was. What is read back is
compared with the checksums that were taken when it was saved.

A checkpoint refuses to know flax: plain dicts can be read without it, and survive its changes. Typed PRNG
keys are saved by their caller as `jax.random.key_data`.
"""

import contextlib
import functools
import gc
import itertools
import json
import logging
import os
import pathlib
import shutil
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from .errors import CheckpointError, DamagedCheckpointError

State = dict[str, Any]  # nested; leaves are jax or numpy arrays


class Checkpointer:
    """The checkpoints of one run, in `folder/STEP/`.

    Args:
      folder: made at the first save.
      every: `save` keeps steps that are multiples of this, and the step at which a preemption is announced.
      keep: how many of the latest committed steps stay on disk; None keeps all.
      keep_every: steps that are multiples of this stay as well.
      keep_best: so many of those that were saved with the lowest `loss` stay as well.

    >>> with Checkpointer("runs/a/checkpoints", every=100, keep=3) as checkpointer:
    ...     checkpointer.save(100, {"params": params}, {"tokens_seen": 409_600})
    >>> state, meta = Checkpointer("runs/a/checkpoints").restore()
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        every: int = 1,
        keep: int | None = None,
        keep_every: int | None = None,
        keep_best: int = 0,
    ):
        if every < 1 or (keep is not None and keep < 1):
            raise ValueError(f"every and keep must be at least 1, but got every={every} and keep={keep}.")
        self.folder = pathlib.Path(folder).absolute()
        self.every, self.keep, self.keep_every, self.keep_best = every, keep, keep_every, keep_best
        self._pending: tuple[int, Any] | None = None  # the step that is being written, and its promise
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file, but checkpoints need a folder.")

    @functools.cached_property
    def _orbax(self):  # for saving only: it makes the folder and cleans it, which a reader must not
        logging.getLogger("absl").addFilter(_is_no_traceback_of_a_thread)
        save, preserve = ocp.training.save_decision_policies, ocp.training.preservation_policies
        kept: list[Any] = [preserve.LatestN(self.keep) if self.keep else preserve.PreserveAll()]
        if self.keep_every:
            kept.append(preserve.EveryNSteps(self.keep_every))
        if self.keep_best:
            lowest = lambda metrics: -metrics["loss"]  # Orbax takes the last of them in ascending order
            kept.append(preserve.BestN(get_metric_fn=lowest, n=self.keep_best, keep_checkpoints_without_metrics=False))
        try:
            return ocp.training.Checkpointer(
                str(self.folder),
                # Orbax saves as often as it can, and keeps everything, unless told otherwise.
                save_decision_policy=save.AnySavePolicy(
                    [save.FixedIntervalPolicy(self.every), save.PreemptionCheckpointingPolicy()]
                ),
                preservation_policy=preserve.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,  # what a killed process left half written
            )
        except OSError as e:
            raise CheckpointError(f"Cannot keep checkpoints in {self.folder}: {e}.") from e

    def should_save(self, step: int) -> bool:
        """Whether `save` would save at `step`: a multiple of `every`, later than every saved step."""
        return self._orbax.should_save(step)

    def save(
        self,
        step: int,
        state: State,
        meta: dict[str, Any] | None = None,
        *,
        loss: float | None = None,
        force: bool = False,
    ) -> bool:
        """Starts to save `state` and `meta` if `should_save(step)` or `force`; returns whether it did.

        The arrays are copied before this returns, so they may be donated or changed at once; the writing goes on
        in the background. A step that is already saved is left as it is.

        Args:
          state: nested dicts with string keys; leaves are jax or numpy arrays, none of them empty.
          meta: anything that JSON can hold: numbers, strings, lists, dicts, None.
          loss: by which `keep_best` compares; None is worse than any.

        Raises `TypeError` for a state or meta that cannot be saved, and `CheckpointError` where an earlier save
        turns out to have failed.
        """
        _check_state(state)
        meta = _as_json({} if meta is None else meta)
        pending = self._pending[0] if self._pending else None
        if not (force or self.should_save(step)) or step in (pending, *self.steps()):
            return False
        self.wait()
        record = {"meta": meta, "meta_checksum": _checksum_json(meta)}
        record["checksums"] = {name: _checksum(x) for name, x in _leaves(state).items()}
        try:
            promise = self._orbax.save_checkpointables_async(
                step,
                {"state": state},
                metrics=None if loss is None else {"loss": float(loss)},
                custom_metadata=record,
                force=True,
            )
        except Exception as e:
            raise self._not_saved(step, e) from e
        self._pending = (step, promise)
        return True

    def steps(self) -> list[int]:
        """The committed steps, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

    def latest_step(self) -> int | None:
        """The latest committed step, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int | None = None, target: State | None = None) -> tuple[State, dict[str, Any]]:
        """Returns the state and meta of `step`, by default the latest.

        Args:
          step: a committed step.
          target: the state's structure; its leaves are jax arrays or `jax.ShapeDtypeStruct`s, to get jax arrays with
            their shardings, or numpy arrays, to get these. Without a target, every array is numpy's.

        Raises `CheckpointError` where there is no such step, where it is damaged, and where it does not have the
        names, shapes and dtypes of `target`.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"There is no checkpoint in {self.folder}{_what_is_there(self.folder)}.")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"There is no step {step} in {self.folder}: it has {', '.join(map(str, steps))}.")
        folder = self.folder / str(step)
        record, saved = self._read(step, lambda: _record_and_shapes(ocp.checkpointables_metadata(str(folder))))
        if not isinstance(record, dict) or _checksum_json(record.get("meta")) != record.get("meta_checksum"):
            raise self._damaged(step, "its meta data cannot be read")
        if set(_leaves(saved)) != set(record.get("checksums", {})):
            raise self._damaged(step, "it does not have the arrays that were saved")
        as_numpy = self._read(step, lambda: jax.tree.map(lambda x: np.empty(x.shape, x.dtype), saved))
        if target is not None:
            _check_fits(as_numpy, target, folder)
        abstract = as_numpy if target is None else jax.tree.map(_abstract, target)
        state = self._read(step, lambda: ocp.load_checkpointables(str(folder), {"state": abstract})["state"])
        wanted = _leaves(as_numpy)
        for name, x in _leaves(state).items():
            if x.dtype != wanted[name].dtype:
                raise CheckpointError(
                    f"{name!r} in {folder} is {wanted[name].dtype}, which jax turned into {x.dtype}: "
                    "call jax.config.update('jax_enable_x64', True) first."
                )
            if _checksum(x) not in (None, record.get("checksums", {}).get(name)):
                raise self._damaged(step, f"the values of {name!r} are not those that were saved")
        return state, record["meta"]

    def restore_latest(
        self, target: State | None = None
    ) -> tuple[State, dict[str, Any], dict[int, DamagedCheckpointError]]:
        """As `restore`, but goes back to the latest step that is whole; also returns what is wrong with later ones.

        Raises `CheckpointError` where none is whole.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        tried: set[int] = set()
        while left := [step for step in self.steps() if step not in tried]:
            step = left[-1]
            tried.add(step)
            try:
                return *self.restore(step, target), damaged
            except CheckpointError as e:
                if step not in self.steps():  # another process trains here, and has newer ones
                    continue
                if not isinstance(e, DamagedCheckpointError):
                    raise
                damaged[step] = e
        if len(damaged) > 1:
            why = "; ".join(f"{step} ({error.why})" for step, error in damaged.items())
            raise DamagedCheckpointError(f"No checkpoint in {self.folder} is whole: {why}. Start again.", why)
        if damaged:
            raise next(iter(damaged.values()))
        return *self.restore(None, target), damaged  # which says that there is none

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        with _quiet("absl", "asyncio"):
            try:
                return read()
            except Exception as e:  # Orbax, tensorstore and json each have errors of their own for a damaged file
                why = _root_cause(e)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                gc.collect()  # reads of other arrays, failed or not begun, would complain when they are collected
        raise self._damaged(step, why)

    def _damaged(self, step: int, why: str) -> DamagedCheckpointError:
        others = [s for s in self.steps() if s != step]
        use = f"restore step {others[-1]}" if others else "start again: it is the only one"
        why = _shortened(why)
        return DamagedCheckpointError(
            f"The checkpoint {self.folder / str(step)} is damaged: {why}. Delete that folder and {use}.", why
        )

    def wait(self) -> None:
        """Returns once every save that was started is committed; raises `CheckpointError` if one failed."""
        if self._pending is None:
            return
        (step, promise), self._pending = self._pending, None
        try:
            promise.result()
        except Exception as e:
            raise self._not_saved(step, e) from e
        if step not in self.steps():
            raise CheckpointError(f"Step {step} was written, but is not in {self.folder}: did something delete it?")

    def _not_saved(self, step: int, e: Exception) -> CheckpointError:
        """The error to raise, once what was half written is gone: on a full disk it would be in the way."""
        with contextlib.suppress(Exception):
            vars(self).pop("_orbax").close()  # it would raise this error again at the next step
        for left in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        why = _shortened(_root_cause(e))
        latest = self.latest_step()
        there = "none is saved" if latest is None else f"the latest is step {latest}"
        return CheckpointError(f"Step {step} could not be saved in {self.folder}: {why}. There, {there}.")

    def set_aside(self, step: int) -> pathlib.Path:
        """Renames the folder of a damaged `step`, so that the step can be saved again; returns where it is now."""
        self.close()  # Orbax remembers which steps there are
        aside = next(p for i in itertools.count() if not (p := self.folder / f"{step}.damaged-{i}").exists())
        return (self.folder / str(step)).rename(aside)

    def close(self) -> None:
        """Waits, then releases what Orbax holds."""
        try:
            self.wait()
        finally:
            if "_orbax" in vars(self):
                vars(self).pop("_orbax").close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _root_cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    return f"{type(e).__name__}: {e}"


def _shortened(why: str) -> str:
    """On one line, without the paths in the middle of tensorstore's messages: what failed, and at the end why."""
    why = " ".join(why.split())
    return why if len(why) <= 200 else f"{why[:90]} ... {why[-90:]}"


@contextlib.contextmanager
def _quiet(*names: str):
    """Keeps the loggers of `names` silent: one error says what they would say many times."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_no_traceback_of_a_thread(record: logging.LogRecord) -> bool:
    """Orbax logs what a writing thread raises, several times, and raises it too: once is enough."""
    return not (record.exc_info and "orbax" in record.pathname)


def _record_and_shapes(metadata: Any) -> tuple[Any, Any]:
    return metadata.custom_metadata, metadata.metadata["state"]


def _leaves(state: State) -> dict[str, Any]:
    """Returns the leaves of `state` by name: {"params/w": ...}."""
    flat, _ = jax.tree.flatten_with_path(state)
    return {"/".join(str(k.key) for k in path): x for path, x in flat}


def _check_state(state: Any, path: str = "") -> None:
    where = f"state[{path!r}]" if path else "The state"
    if isinstance(state, dict):
        for key, child in state.items():
            if not isinstance(key, str) or not key or "/" in key:
                raise TypeError(f"{where} has the key {key!r}, but keys must be strings, not empty and without '/'.")
            _check_state(child, f"{path}/{key}" if path else key)
    elif not path:
        raise TypeError(f"The state must be a dict, but got {type(state).__name__}.")
    elif not isinstance(state, jax.Array | np.ndarray):
        hint = "wrap it in np.asarray, or put it into meta" if np.isscalar(state) else "use nested dicts"
        raise TypeError(f"{where} must be a dict or an array, but got {type(state).__name__}: {hint}.")
    elif jnp.issubdtype(state.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a typed PRNG key: save jax.random.key_data(key), and wrap_key_data on restore.")
    elif not state.size:
        raise TypeError(f"{where} is empty (shape {state.shape}), which cannot be saved: leave it out.")


def _as_json(meta: Any) -> Any:
    try:
        return json.loads(json.dumps(meta))
    except (TypeError, ValueError) as e:
        raise TypeError(f"meta must be what JSON can hold (numbers, strings, lists, dicts, None): {e}.") from None


def _checksum_json(x: Any) -> int:
    return zlib.crc32(json.dumps(x, sort_keys=True).encode())


def _checksum(x: Any) -> int | None:
    """CRC-32 of the bytes of `x`; None for an array of which other hosts hold a part."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def _check_fits(saved: State, target: State, folder: pathlib.Path) -> None:
    describe = lambda x: f"{x.dtype}{list(x.shape)}"
    have = {name: describe(x) for name, x in _leaves(saved).items()}
    want = {name: describe(x) for name, x in _leaves(target).items()}
    wrong = [
        f"{name} is {have[name]}, wanted {want[name]}" for name in want if have.get(name, want[name]) != want[name]
    ]
    wrong += [f"{name} is not there" for name in want if name not in have]
    wrong += [f"{name} is there, but is not wanted" for name in have if name not in want]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"The checkpoint {folder} does not fit: {'; '.join(wrong[:5])}{more}. "
            "Restore it with the config that it was trained with."
        )


def _abstract(x: Any) -> np.ndarray | jax.ShapeDtypeStruct:
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, x.dtype)
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _what_is_there(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        return ", which does not exist"
    left = [p.name for p in folder.iterdir() if ".orbax-checkpoint-tmp" in p.name]
    return f", only a save that was cut off ({left[0]})" if left else ""
