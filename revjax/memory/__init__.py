"""What a training step costs in memory, beside the alternatives."""

from .baseline import RIVALS as RIVALS
from .baseline import checkpoint_loss as checkpoint_loss
from .baseline import residual_loss as residual_loss
from .baseline import residual_stack as residual_stack
from .baseline import stored_loss as stored_loss
from .budget import budget_bytes as budget_bytes
from .budget import known_hardware as known_hardware
from .budget import parse_bytes as parse_bytes
from .cost import Cost as Cost
from .cost import step_cost as step_cost
from .devices import HARDWARE as HARDWARE
from .devices import Hardware as Hardware
from .devices import peak_flops as peak_flops
from .measure import activation_memory as activation_memory
from .measure import temp_bytes as temp_bytes
from .plan_plot import plot_plans as plot_plans
from .planner import Candidate as Candidate
from .planner import Choice as Choice
from .planner import Found as Found
from .planner import knee as knee
from .planner import largest as largest
from .planner import search as search
from .timeline import Buffer as Buffer
from .timeline import Timeline as Timeline
from .timeline import timeline as timeline
from .timeline_plot import plot_timeline as plot_timeline
