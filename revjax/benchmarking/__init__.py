"""Claims, measured beside their rivals in one run: exactness, gradients, memory, speed, and quality."""

from .exactness import EXACT_COUPLINGS as EXACT_COUPLINGS
from .exactness import ExactnessConfig as ExactnessConfig
from .exactness import exactness as exactness
from .frontier_plot import plot_frontier as plot_frontier
from .gradients import GradientsConfig as GradientsConfig
from .gradients import gradients as gradients
from .memory import MemoryConfig as MemoryConfig
from .memory import memory as memory
from .speed import SpeedConfig as SpeedConfig
from .speed import speed as speed
from .study import StudyConfig as StudyConfig
from .study import compare as compare
from .study import summarize as summarize
from .study import table as table
from .study_plot import plot as plot
from .suites import ABOUT as ABOUT
from .suites import SUITES as SUITES
from .suites import run_suite as run_suite
