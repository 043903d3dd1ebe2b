"""`revjax convert from-hf PATH --output=RUN` and `revjax convert to-hf RUN --output=PATH`."""

from .. import experiment
from ..config import help_text, load
from ..conversion import FAMILIES
from ..errors import ConfigError, nearest
from ..logging import setup
from .words import leading_names, take

USAGE = (
    "revjax convert from-hf PATH --output=RUN [--coupling=near-residual:4] | "
    "revjax convert to-hf RUN --output=PATH [--dtype=bfloat16]"
)
DESCRIPTION = f"""{USAGE}

from-hf makes a folder with config.json and safetensors, as transformers saves it, into the folder of a run that stands
before its first step, and says how far it is from the pretrained model, step by step: float32 here beside transformers
(where that is installed), integer streams, the coupling, the compute dtype; and whether it is exact. Then train with
RUN/config.yaml and --training.start_from=RUN, or generate and evaluate at once.

to-hf writes a run's parameters as a checkpoint of the stock architecture, which transformers loads, and says what that
changes: the stock network has no coupling (b = 0).

Architectures: {", ".join(f.architecture for f in FAMILIES.values())}."""

WAYS = {"from-hf": experiment.FromHFConfig, "to-hf": experiment.ToHFConfig}


def convert(argv: list[str]) -> int:
    """Converts a pretrained checkpoint to a run, or a run to such a checkpoint; returns the exit code."""
    names, settings = leading_names(argv)
    way = names[0] if names else "from-hf"
    if take(settings, "-h", "--help"):
        print(help_text(WAYS.get(way, experiment.FromHFConfig), prog=f"revjax convert {way}", description=DESCRIPTION))
        return 0
    if len(names) != 2 or way not in WAYS:
        hint = nearest(way, WAYS) if names and way not in WAYS else ""
        raise ConfigError(f"Expected from-hf or to-hf and a folder, but got {' '.join(names) or 'none'}.{hint} {USAGE}")
    setup()
    config = load(WAYS[way], (), settings, environ={})
    if way == "from-hf":
        run, fidelity = experiment.from_hf(names[1], config)
        print(experiment.describe_from_hf(names[1], run, fidelity))
    else:
        architecture, found = experiment.to_hf(names[1], config)
        if found is not None:
            print(experiment.describe_departure(found))
        print(f"{'written':<12} {config.output}/: {architecture}")
    return 0
