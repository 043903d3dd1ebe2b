"""The folder of one run. Only one configuration ever writes to it.

config.yaml         as resolved, with the versions that it was started with; config.1.yaml, ... before it was changed
metrics.jsonl       one line for each step            validation.jsonl   one for each evaluation
samples.jsonl       one line for each sample          trouble.jsonl      one for each gradient not trusted
checkpoints/STEP    the latest few                    loss.png, sample.txt
tokenizer.json      where the text is not in bytes       tensorboard/, wandb/   curves, where they are wanted
huggingface/        what came with pretrained parameters, and goes out with them again
.lock               held by the process that trains here
"""

import dataclasses
import errno
import itertools
import os
import pathlib
import shutil
from collections.abc import Collection
from typing import Any

from ..config import dump, load
from ..errors import ConfigError, RunFolderError, nearest
from .metrics import LOGS, read_metrics

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing keeps two processes apart
    fcntl = None


class RunFolder:
    """A folder that does not exist yet, is empty, or holds this very run.

    Args:
      path: of the folder. Nothing is written before `claim`.
      config: a dataclass instance. It must be what the folder's config.yaml says, where there is one.
      ignore: dotted names (of fields, or of sections) in which the two may differ.
      allow: names in which they may differ this once: from now on the folder's config.yaml is `config`.

    Raises `RunFolderError` where the folder is a file, or holds another run or something else, and `ConfigError` for
    a name in `allow` that there is not.
    """

    def __init__(self, path: pathlib.Path, config: Any, *, ignore: Collection[str] = (), allow: Collection[str] = ()):
        self.path, self.config = path, config
        self.changed: list[str] = []  # what differs, and is allowed to
        self.checkpoints = path / "checkpoints"
        self.is_new = not path.exists() or (path.is_dir() and self._is_unbegun())
        self._lock: Any = None
        for name in allow:
            if name not in _flat(config):
                raise ConfigError(f"--allow-change: there is no field {name!r}.{nearest(name, _flat(config))}")
        if not self.is_new:
            self._check_same(ignore, allow)

    def _is_unbegun(self) -> bool:
        """Whether there is nothing in the folder, or only what a run leaves there before its first step."""
        ours = {
            ".lock",
            "config.yaml",
            "config.tmp",
            "checkpoints",
            "tokenizer.json",
            "tokenizer.json.tmp",
            "huggingface",
            "huggingface.tmp",
            "tensorboard",
            "wandb",
            *(f"{name}.jsonl" for name in LOGS),
        }
        steps = any(p.name.isdecimal() for p in self.checkpoints.glob("*"))
        others = any(p.name not in ours for p in self.path.iterdir())
        if steps or others or read_metrics(self.path / "metrics.jsonl"):
            return False
        if (self.path / "config.yaml").exists():
            read_config(self.path, type(self.config))  # or it is the file of something else
        return True

    def _check_same(self, ignore: Collection[str], allow: Collection[str]) -> None:
        there = read_config(self.path, type(self.config), otherwise="Choose another run.name or run.folder.")
        ours, theirs = _flat(self.config), _flat(there)
        ignored = lambda name: any(name == i or name.startswith(f"{i}.") for i in ignore)
        different = [name for name in ours if ours[name] != theirs.get(name) and not ignored(name)]
        self.changed = [name for name in different if name in allow]
        different = [name for name in different if name not in allow]
        if different:
            shown = "; ".join(f"{name} was {theirs.get(name)!r} and is now {ours[name]!r}" for name in different[:4])
            more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
            raise RunFolderError(
                f"{self.path} holds a run with another configuration: {shown}{more}. Give this run a name of its own, "
                f"--run.name={self.path.name}-2, or, where its parameters keep their shapes, go on with the change, "
                f"--allow-change={','.join(different)}."
            )

    def claim(self, header: str) -> None:
        """Makes the folder and writes config.yaml, below `header` as a comment; leaves a run that is there alone.

        Until `release`, or the end of the process, no other process can claim it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / ".lock")
            if self.changed:
                older = next(p for i in itertools.count(1) if not (p := self.path / f"config.{i}.yaml").exists())
                older.write_bytes((self.path / "config.yaml").read_bytes())
            if self.is_new or self.changed:
                text = "".join(f"# {line}\n" for line in header.splitlines()) + dump(self.config)
                _write_at_once(self.path / "config.yaml", text)
        except OSError as e:
            raise RunFolderError(
                f"Cannot write to {self.path}: {e.strerror}. Set run.folder to another place."
            ) from None

    def refuse_claimed(self) -> None:
        """Raises `RunFolderError` while another process has claimed the folder."""
        if (self.path / ".lock").exists():
            try:
                _locked(self.path / ".lock").close()
            except OSError:  # not ours to write: `claim` says so
                pass

    def keep(self, name: str, contents: bytes) -> None:
        """Writes a file of the folder at once, unless it is there. The folder must be claimed."""
        if not (self.path / name).exists():
            temporary = self.path / f"{name}.tmp"
            temporary.write_bytes(contents)
            os.replace(temporary, self.path / name)

    def release(self) -> None:
        """Lets another process claim the folder."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def give_up(self) -> None:
        """Deletes the folder if this run made it and no step was made."""
        if self.is_new and self.path.is_dir() and self._is_unbegun():
            shutil.rmtree(self.path, ignore_errors=True)


def _write_at_once(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _locked(path: pathlib.Path) -> Any:
    """The file at `path`, open and locked; raises `RunFolderError` if another process has locked it."""
    file = path.open("a")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise RunFolderError(
                f"Another process is training in {path.parent}. Wait until it ends, or give this run another name, "
                f"--run.name={path.parent.name}-2."
            ) from None
    return file  # a file system without locks (some network mounts) gives none


def read_config(path: pathlib.Path, schema: type, *, otherwise: str = "") -> Any:
    """Returns the configuration of the run in the folder `path`; raises `RunFolderError` where there is none.

    `otherwise` says what to do where the folder is not that of a run; without it, its runs are named.
    """
    if not path.exists():
        others = sorted(p.parent.name for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        known = f" {path.parent} has {', '.join(others)}." if others else ""
        raise RunFolderError(f"There is no run in {path}: the folder does not exist.{known}")
    if not path.is_dir():
        raise RunFolderError(f"{path} is a file, but a run needs a folder.")
    if not (path / "config.yaml").is_file():
        inside = sorted(p.parent for p in path.glob("*/config.yaml"))
        choice = f"Give one of its runs, such as {inside[0]}." if inside else "Give the folder of a run."
        raise RunFolderError(
            f"{path} is not the folder of a run: it has no config.yaml, but {_names(path)}. {otherwise or choice}"
        )
    try:
        return load(schema, path / "config.yaml", environ={})
    except ConfigError as e:
        raise RunFolderError(f"The run in {path} was made by another version, or changed by hand: {e}") from None


def _names(path: pathlib.Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "") if names else "nothing"


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    if not dataclasses.is_dataclass(config):
        return {path: config}
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        flat |= _flat(getattr(config, f.name), f"{path}.{f.name}" if path else f.name)
    return flat
