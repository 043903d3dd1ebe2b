"""Trains what `build` made ready, in the run's folder."""

import dataclasses
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp

from ..checkpoint import Checkpointer
from ..data import CHAT_TEMPLATE, Corpus, DataConfig, FileTokenizer, load_template
from ..errors import RunFolderError
from ..logging import get_logger
from ..memory import peak_flops
from ..models import DecoderConfig, flops_per_token, hardware_flops_per_token
from ..training import (
    MetricsLog,
    Outcome,
    StopRequest,
    TensorBoard,
    Tracker,
    WeightsAndBiases,
    Work,
    plot_losses,
    read_metrics,
    train,
)
from .build import Experiment
from .config import RunConfig, SampleConfig
from .evaluation import losses
from .pretrained import keep_pretrained
from .reading import held_out
from .samples import sample_text
from .trained import TOKENIZER
from .versions import git_revision, versions

EXIT_STOPPED = 3  # training.on_trouble ended it, or its model is broken


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    outcome: Outcome
    start_step: int
    seconds: float
    sample: str | None  # None also where the model added nothing to the prompt
    folder: pathlib.Path
    is_broken: bool = False  # parameters that are not finite, or a last held-out loss that is not

    @property
    def exit_code(self) -> int:
        """0 finished; 128 + its number after a signal, as shells have it; 3 stopped by on_trouble, or broken."""
        if self.outcome.ended == "interrupted":
            return 128 + (self.outcome.signal or signal.SIGINT)
        return EXIT_STOPPED if self.outcome.ended == "stopped" or self.is_broken else 0


def run(experiment: Experiment) -> Result:
    """Trains in the run's folder until it is finished or interrupted, and leaves loss.png and sample.txt there.

    The arrays of `experiment.state` are used up.
    """
    config, folder, started = experiment.config, experiment.folder, time.perf_counter()
    start_step = experiment.start_step
    made_with = {"versions": versions(), "git": git_revision(), "backend": jax.default_backend()}
    folder.claim(", ".join(filter(None, made_with.values())))
    try:
        _keep_tokenizer(experiment)
        if config.training.start_from is not None:
            keep_pretrained(config.training.start_from, folder.path)
        _refuse_stale(experiment)
        with (
            StopRequest() as stop_request,
            Checkpointer(
                folder.checkpoints,
                every=config.training.checkpoint_every,
                keep=config.training.keep_latest,
                keep_every=config.training.keep_every,
                keep_best=config.training.keep_best,
            ) as checkpointer,
            MetricsLog(
                folder.path, start_step=experiment.start_step, trackers=_trackers(experiment, made_with)
            ) as metrics_log,
        ):
            for step, error in experiment.damaged.items():
                get_logger(__name__).error(
                    "The checkpoint of step %d is damaged (%s). It is kept as %s, and training goes on from step %d.",
                    step,
                    error.why,
                    checkpointer.set_aside(step),
                    start_step,
                )
            outcome = train(
                experiment.state,
                experiment.train_step,
                experiment.batches,
                config=config.training,
                skeleton=experiment.skeleton,
                evaluate=_evaluation(experiment, stop_request),
                sample=_sampling(experiment),
                work=_work(experiment),
                meta=made_with | {"config": dataclasses.asdict(config), "run_id": experiment.run_id},
                checkpointer=checkpointer,
                metrics_log=metrics_log,
                stop_request=stop_request,
            )
            is_broken = _is_broken(experiment, outcome)
            sample = _leave_results(experiment, outcome, is_broken)
    except BaseException:
        folder.give_up()
        raise
    finally:
        folder.release()
    return Result(outcome, start_step, time.perf_counter() - started, sample, folder.path, is_broken)


def _keep_tokenizer(experiment: Experiment) -> None:
    """Leaves in the run's folder what turned text into tokens."""
    data, corpus, folder = experiment.config.data, experiment.corpus, experiment.folder
    if isinstance(corpus, Corpus) and isinstance(corpus.tokenizer, FileTokenizer):
        folder.keep(TOKENIZER, corpus.tokenizer.file)
    if isinstance(data, DataConfig) and (template := load_template(data)) is not None:
        folder.keep(CHAT_TEMPLATE, template.file)


def _work(experiment: Experiment) -> Work:
    config, corpus = experiment.config, experiment.corpus
    tokens, length = config.tokens_per_step, config.row_length
    predicts_text = isinstance(config.model, DecoderConfig)
    peak = config.training.peak_flops or peak_flops(jax.devices()[0].device_kind, config.model.dtype)
    sweeps = 2 if config.optimizer.in_backward == "two_sweeps" else 1
    return Work(
        tokens,
        bytes_per_token=corpus.bytes_per_token if isinstance(corpus, Corpus) and predicts_text else None,
        model_flops=tokens * flops_per_token(config.model, length),
        hardware_flops=sweeps * tokens * hardware_flops_per_token(config.model, length, config.memory.plan),
        peak_flops=peak and peak * experiment.devices.count,
    )


def _trackers(experiment: Experiment, made_with: dict[str, Any]) -> list[Tracker]:
    config, folder = experiment.config, experiment.folder.path
    found: list[Tracker] = []
    if config.training.wandb is not None:
        shown = dataclasses.asdict(config) | made_with
        project, run_id, name = config.training.wandb, experiment.run_id, config.run.name
        found.append(WeightsAndBiases(folder, project=project, run_id=run_id, name=name, config=shown))
    if config.training.tensorboard:
        try:
            found.append(TensorBoard(folder / "tensorboard"))
        except OSError as e:  # a full disk
            get_logger(__name__).error("No curves for TensorBoard: %s.", e.strerror)
    return found


def _refuse_stale(experiment: Experiment) -> None:
    """Another process may have trained here between `build` and now."""
    with Checkpointer(experiment.folder.checkpoints) as checkpointer:
        latest = max((step for step in checkpointer.steps() if step not in experiment.damaged), default=0)
    if latest != experiment.start_step:
        raise RunFolderError(
            f"{experiment.folder.path} stood at step {experiment.start_step} when this process read it, and is now at "
            f"step {latest}: another process trained there. Start again, and it goes on from there."
        )


def _evaluation(experiment: Experiment, stop_request: StopRequest):
    config = experiment.config
    parts = held_out(config, experiment.corpus, config.training.eval_batches)
    stop = lambda: stop_request.signal is not None
    return (lambda state: losses(experiment.eval_step, state.eval_params, parts, stop=stop)) if parts else None


def _sampling(experiment: Experiment):
    options, corpus = experiment.config.training, experiment.corpus
    if not experiment.config.sample_prompt:
        return None
    assert isinstance(corpus, Corpus)
    sample = SampleConfig(
        prompt=options.sample_prompt,
        max_new_tokens=options.sample_tokens,
        temperature=options.sample_temperature,
        seed=options.seed,
    )
    return lambda state: sample_text(experiment.skeleton.merge(state.eval_params), corpus.tokenizer, sample)


def _is_broken(experiment: Experiment, outcome: Outcome) -> bool:
    """Whether the model's last held-out loss is no number, or its parameters are not finite."""
    last = read_metrics(experiment.folder.path / "validation.jsonl")[-1:]
    are_finite = jax.jit(lambda params: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all())
    return any(line["loss"] is None for line in last) or not are_finite(outcome.state.eval_params)


def _leave_results(experiment: Experiment, outcome: Outcome, is_broken: bool) -> str | None:
    """Writes loss.png, and sample.txt where training was not interrupted and the model is not broken.

    Returns the sample, or None where the model added nothing to the prompt.
    """
    sample = None if is_broken or outcome.ended == "interrupted" else _sampling(experiment)
    if sample:
        get_logger(__name__).info("a sample of %d tokens", experiment.config.training.sample_tokens)
    text = sample(outcome.state) if sample else None
    try:
        plot_losses(experiment.folder.path, title=_title(experiment.config))
        if text:
            (experiment.folder.path / "sample.txt").write_text(text + "\n", encoding="utf-8")
    except OSError as e:  # a full disk: the checkpoint is there, and everything can be had again from it
        get_logger(__name__).error(
            "Cannot write loss.png and sample.txt to %s: %s.", experiment.folder.path, e.strerror
        )
    prompt = experiment.config.training.sample_prompt
    return text if text and text.removeprefix(prompt).strip() else None


def _title(config: RunConfig) -> str:
    model = config.model
    return f"{config.run.name}: {model.num_layers} layers, d_model {model.d_model}, coupling {model.coupling}"
