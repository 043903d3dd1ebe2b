"""Training: a pure step over any module and loss, and the loop around it."""

from .comparison import find_runs as find_runs
from .comparison import plot_runs as plot_runs
from .comparison import summarize_run as summarize_run
from .comparison import table as table
from .folder import RunFolder as RunFolder
from .loop import Outcome as Outcome
from .loop import TrainingConfig as TrainingConfig
from .loop import mean_loss as mean_loss
from .loop import train as train
from .metrics import MetricsLog as MetricsLog
from .metrics import bits_per_byte as bits_per_byte
from .metrics import read_metrics as read_metrics
from .metrics import rewinds_to as rewinds_to
from .optimizer import OptimizerConfig as OptimizerConfig
from .optimizer import make_optimizer as make_optimizer
from .plots import plot_losses as plot_losses
from .reader import Work as Work
from .schedule import make_schedule as make_schedule
from .signals import StopRequest as StopRequest
from .state import Skeleton as Skeleton
from .state import TrainState as TrainState
from .state import init_state as init_state
from .state import split as split
from .step import make_eval_step as make_eval_step
from .step import make_train_step as make_train_step
from .tensorboard import TensorBoard as TensorBoard
