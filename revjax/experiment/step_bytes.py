"""What compiled steps took, kept in the user's cache: the same question is answered without compiling again.

What a step takes follows from its configuration, from the code that makes it, and from the device that it is for. The
name of a file is a digest of all of these, so that nothing is ever read that may have changed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform

import jax

from ..config import dump, users_cache
from .config import FolderConfig, MemoryConfig, RunConfig
from .versions import versions


def recall(config: RunConfig, *, to_run: bool) -> int | None:
    """The bytes that `remember` was told of this step; None where it was not, or where none are kept."""
    path = _path(config, to_run)
    try:
        found = None if path is None else json.loads(path.read_bytes())["bytes"]
    except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: then it is measured again
        return None
    return found if isinstance(found, int) and found > 0 else None


def remember(config: RunConfig, found: int, *, to_run: bool) -> None:
    """Keeps the bytes of a compiled step of `config`; in vain where the cache cannot be written.

    Args:
      to_run: whether it was compiled to be run, or only to be asked for its memory (`Program.compile`).
    """
    path = _path(config, to_run)
    if path is None:
        return
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps({"bytes": found, "name": config.run.name, "versions": versions()}))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # of a full disk


def _path(config: RunConfig, to_run: bool) -> pathlib.Path | None:
    """None where nothing is to be cached, or where code that is not revjax's has a part in the step."""
    if config.run.compilation_cache is None or "." in config.model.coupling.partition(":")[0]:
        return None
    memory = dataclasses.replace(config.memory, budget=MemoryConfig().budget)  # which chooses a step, and is none of it
    device = jax.devices()[0]
    of = {
        "config": dump(dataclasses.replace(config, run=FolderConfig(), memory=memory)),
        "to_run": to_run,
        "code": _digest_of_package(),
        "versions": versions(),
        "devices": [d.device_kind for d in jax.devices()],
        "compiler": getattr(device.client, "platform_version", ""),
        "machine": platform.node() if device.platform == "cpu" else "",  # CPUs all have the same kind
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("XLA_", "JAX_", "LIBTPU_"))},
    }
    return users_cache("step-bytes") / f"{hashlib.sha256(json.dumps(of).encode()).hexdigest()}.json"


@functools.cache
def _digest_of_package() -> str:
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
