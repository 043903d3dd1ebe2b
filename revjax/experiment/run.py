"""Trains what `build` made ready, in the run's folder."""

import dataclasses
import functools
import pathlib
import signal
import time

import jax

from ..checkpoint import Checkpointer
from ..data import validation_batches
from ..errors import RunFolderError
from ..training import MetricsLog, Outcome, StopRequest, TrainState, mean_loss, plot_losses, train
from .build import Experiment
from .config import RunConfig, SampleConfig
from .samples import sample_text
from .versions import versions

EXIT_STOPPED = 3  # training.on_trouble: stop


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    outcome: Outcome
    seconds: float
    sample: str | None
    folder: pathlib.Path

    @property
    def exit_code(self) -> int:
        """0 finished; 130 or 143 after Ctrl-C or SIGTERM, as shells have it; 3 stopped (training.on_trouble: stop)."""
        if self.outcome.ended == "interrupted":
            return 128 + (self.outcome.signal or signal.SIGINT)
        return EXIT_STOPPED if self.outcome.ended == "stopped" else 0


def run(experiment: Experiment) -> Result:
    """Trains in the run's folder until it is finished or interrupted, and leaves loss.png and sample.txt there.

    The arrays of `experiment.state` are used up.
    """
    config, folder, started = experiment.config, experiment.folder, time.perf_counter()
    if experiment.start_step >= config.training.steps:
        outcome = Outcome(experiment.state, "finished")
        return Result(outcome, 0.0, _write_sample(experiment, outcome.state), folder.path)
    folder.claim(f"{versions()}, {jax.default_backend()}")
    try:
        _refuse_stale(experiment)
        with (
            StopRequest() as stop_request,
            Checkpointer(
                folder.checkpoints, every=config.training.checkpoint_every, keep=config.training.keep_checkpoints
            ) as checkpointer,
            MetricsLog(folder.path, start_step=experiment.start_step) as metrics_log,
        ):
            outcome = train(
                experiment.state,
                experiment.train_step,
                experiment.batches,
                config=config.training,
                skeleton=experiment.skeleton,
                evaluate=_evaluation(experiment),
                checkpointer=checkpointer,
                metrics_log=metrics_log,
                stop_request=stop_request,
            )
    except BaseException:
        folder.give_up()
        raise
    finally:
        folder.release()
    seconds = time.perf_counter() - started
    plot_losses(folder.path, title=_title(config))
    sample = None if outcome.ended == "interrupted" else _write_sample(experiment, outcome.state)
    return Result(outcome, seconds, sample, folder.path)


def _refuse_stale(experiment: Experiment) -> None:
    """Another process may have trained here between `build` and now."""
    with Checkpointer(experiment.folder.checkpoints) as checkpointer:
        latest = checkpointer.latest_step() or 0
    if latest != experiment.start_step:
        raise RunFolderError(
            f"{experiment.folder.path} stood at step {experiment.start_step} when this process read it, and is now at "
            f"step {latest}: another process trained there. Start again, and it goes on from there."
        )


def _evaluation(experiment: Experiment):
    config, tokens = experiment.config, experiment.corpus.validation
    if not len(tokens):
        return None
    sizes = dict(batch_size=config.data.batch_size, sequence_length=config.data.sequence_length)
    rows = functools.partial(validation_batches, tokens, **sizes, max_batches=config.training.eval_batches)
    return lambda state: mean_loss(experiment.eval_step, state.eval_params, rows())


def _write_sample(experiment: Experiment, state: TrainState) -> str | None:
    options = experiment.config.training
    if not options.sample_prompt:
        return None
    text = sample_text(
        experiment.skeleton.merge(state.eval_params),
        SampleConfig(
            prompt=options.sample_prompt,
            max_new_tokens=options.sample_tokens,
            temperature=options.sample_temperature,
            seed=options.seed,
        ),
    )
    (experiment.folder.path / "sample.txt").write_text(text + "\n", encoding="utf-8")
    return text


def _title(config: RunConfig) -> str:
    model = config.model
    return f"{config.run.name}: {model.num_layers} layers, d_model {model.d_model}, coupling {model.coupling}"
