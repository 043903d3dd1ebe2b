"""`revjax export runs/NAME [--output=runs/NAME/model.safetensors]`."""

import dataclasses
import pathlib

from .. import experiment
from ..config import help_text, load
from .words import leading_names, one_name, take

USAGE = "revjax export runs/NAME [--output=runs/NAME/model.safetensors]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Where to."""

    output: str | None = None  # a file that is not there yet; null is model.safetensors in the run's folder


def export(argv: list[str]) -> int:
    """Writes the parameters of a run's latest checkpoint as safetensors; returns the exit code."""
    names, settings = leading_names(argv)
    if take(settings, "-h", "--help"):
        print(help_text(ExportConfig, prog="revjax export", description=USAGE))
        return 0
    config = load(ExportConfig, (), settings, environ={})
    folder = one_name(names, USAGE)
    output = config.output or str(pathlib.Path(folder) / "model.safetensors")
    print(f"{output}: {experiment.export(folder, output):,} parameters")
    return 0
