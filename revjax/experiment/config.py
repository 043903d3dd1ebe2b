"""The configuration of a run, checked as a whole."""

import dataclasses
import math
import pathlib

from ..core import parse_coupling
from ..core.plan import Reverse, keeps
from ..core.plan import parse as parse_plan
from ..data import DataConfig, ImagesConfig
from ..errors import ConfigError
from ..generation import Sampling
from ..models import DecoderConfig, EncoderConfig, ModelConfig, VisionConfig
from ..sharding import MeshConfig
from ..training import OptimizerConfig, TrainingConfig

# What may change between two starts of one run: it does not change what the run computes.
FREE = (
    "data.cache",
    "mesh",
    "run",
    "training.keep_best",
    "training.keep_every",
    "training.keep_latest",
    "training.log_every_s",
    "training.on_save_error",
    "training.peak_flops",
    "training.sample_every",
    "training.stall_after_s",
    "training.tensorboard",
    "training.sample_prompt",
    "training.sample_temperature",
    "training.sample_tokens",
    "training.wandb",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Where results go: `folder/name`."""

    name: str = "default"
    folder: str = "runs"
    compilation_cache: str | None = "auto"  # folder of compiled programs; auto is the user's cache, null: no caches

    def __post_init__(self):
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\\0"):
            raise ValueError(f"name must be the name of a folder, without slashes, but got {self.name!r}.")

    @property
    def path(self) -> pathlib.Path:
        return pathlib.Path(self.folder).expanduser() / self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What the backward pass finds kept."""

    # nothing (rebuild), attention (rebuild, but keep attention's outputs), inputs:K (recompute from every K-th layer),
    # host:K (the same, with those layers' streams in the host's memory; not on a CPU) or all (store); parts of the
    # layers may have each their own, first layers first: "40 nothing, 8 all"; or auto: the fastest step that fits into
    # the budget is looked for, which sets the plan, accumulation, model.loss_tile and model.mlp_chunk (these two at
    # most as given)
    plan: str = "auto"
    # of one device, where plan is auto: bytes ("40GiB"), a part of it ("0.5"), auto (most of it), balanced (where less
    # begins to cost much more time) or aggressive (as little as can be)
    budget: str = "auto"
    accumulation: int = 1  # micro-batches that data.batch_size is cut into, one after another

    @property
    def is_open(self) -> bool:
        """Whether the plan is still to be looked for."""
        return self.plan == "auto"

    def __post_init__(self):
        if not self.is_open:
            parse_plan(self.plan)
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, but got {self.accumulation}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run depends on, but for the text itself."""

    run: FolderConfig = FolderConfig()
    model: ModelConfig = DecoderConfig()  # of another family with `family: encoder`, vision or encoder-decoder
    data: DataConfig | ImagesConfig = DataConfig()  # of images with `kind: images`
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    memory: MemoryConfig = MemoryConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def row_length(self) -> int:
        """Tokens of a row, as the model sees it."""
        return self.model.num_tokens if isinstance(self.model, VisionConfig) else self._text.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the rows of one update."""
        return self.data.batch_size * self.row_length

    @property
    def sample_prompt(self) -> str:
        """What a sample continues; "" where there is none, or the model generates no text."""
        return self.training.sample_prompt if isinstance(self.model, DecoderConfig) else ""

    def __post_init__(self):
        self._check_family()
        object.__setattr__(self, "optimizer", self.optimizer.in_steps(self.tokens_per_step))
        if self.training.tokens is not None:
            steps = -(-self.training.tokens // self.tokens_per_step)
            object.__setattr__(self, "training", dataclasses.replace(self.training, steps=steps))
        if self.data.batch_size % self.memory.accumulation:
            raise ConfigError(
                f"memory.accumulation must divide data.batch_size, but got {self.memory.accumulation} and "
                f"{self.data.batch_size}."
            )
        if self.optimizer.in_backward is not None:
            self._check_in_backward(self.optimizer.in_backward)
        if not self.memory.is_open:
            self._check_plan()
        self._check_positions()

    @property
    def _text(self) -> DataConfig:
        assert isinstance(self.data, DataConfig)
        return self.data

    def _check_positions(self) -> None:
        model = self.model
        if not isinstance(model, DecoderConfig | EncoderConfig) or model.positions != "learned":
            return
        if model.max_length < self._text.sequence_length:
            raise ConfigError(
                f"Learned positions end at model.max_length={model.max_length}, but data.sequence_length is "
                f"{self._text.sequence_length}. Set --model.max_length={self._text.sequence_length}."
            )

    def _check_family(self) -> None:
        family = self.model.family
        if isinstance(self.model, VisionConfig) != isinstance(self.data, ImagesConfig):
            wanted, got = ("images", "text") if family == "vision" else ("text", "images")
            raise ConfigError(
                f"model.family {family} reads {wanted}, but data.kind is {got}. Set data.kind to {wanted}, or take "
                f"another model.family ({'vision' if got == 'images' else 'decoder'})."
            )
        if isinstance(self.data, DataConfig) and self.data.chat_template and not isinstance(self.model, DecoderConfig):
            raise ConfigError(f"data.chat_template is for decoders, and model.family is {family}: leave it out.")

    def _check_in_backward(self, how: str) -> None:
        if self.memory.accumulation > 1:
            raise ConfigError(
                f"optimizer.in_backward={how} has no gradients to add up: memory.accumulation must be 1, but got "
                f"{self.memory.accumulation}."
            )
        if self.training.on_trouble == "warn":
            raise ConfigError(
                f"optimizer.in_backward={how} leaves out updates that are known to be wrong, so training.on_trouble "
                "cannot be warn. Set --training.on_trouble=skip."
            )
        known_late = "training.spike_sigmas" if self.training.spike_sigmas is not None else "model.dtype=float16"
        if how == "one_sweep" and (self.training.spike_sigmas is not None or self.model.dtype == "float16"):
            raise ConfigError(
                f"optimizer.in_backward=one_sweep has updated layers before {known_late} can refuse the update. Set "
                "--optimizer.in_backward=two_sweeps."
            )

    def _check_plan(self) -> None:
        try:
            kept = keeps(self.memory.plan, self.model.run_lengths)
        except ValueError as e:
            raise ConfigError(f"memory.plan: {e} (model.num_layers)") from None
        if not parse_coupling(self.model.coupling).reversible and any(isinstance(keep, Reverse) for keep in kept):
            raise ConfigError(
                f"model.coupling {self.model.coupling!r} has no inverse, so memory.plan {self.memory.plan!r} cannot "
                "rebuild its streams. Set memory.plan to 'inputs' (recompute) or 'all' (store), or take a reversible "
                "coupling."
            )

    def for_epochs_of(self, rows: float) -> "RunConfig":
        """This configuration with `training.epochs`, of so many rows, said in steps."""
        if self.training.epochs is None:
            return self
        steps = max(math.ceil(self.training.epochs * rows / self.data.batch_size), 1)
        return dataclasses.replace(self, training=dataclasses.replace(self.training, steps=steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling):
    """What to generate."""

    prompt: str = "def "  # what the text continues; "" begins a document
    chat: bool = False  # prompts are what a user says, and texts what the assistant answers, by the run's template
    prompts: str | None = None  # a file of prompts, one a line or, in .jsonl, a field of each; instead of `prompt`
    batch_size: int = 16  # prompts of the file that are continued at once
    max_new_tokens: int = 300
    temperature: float = 0.7  # 0 always takes the likeliest token, 1 is the model's own distribution
    stop: tuple[str, ...] = ()  # texts before which it ends
    seed: int = 0  # another one, another text

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {self.batch_size}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, but got {self.max_new_tokens}.")
