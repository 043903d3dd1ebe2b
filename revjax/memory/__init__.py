"""What a training step costs in memory, beside the alternatives."""

from .baseline import checkpoint_loss as checkpoint_loss
from .baseline import residual_stack as residual_stack
from .baseline import stored_loss as stored_loss
from .devices import peak_flops as peak_flops
from .measure import activation_memory as activation_memory
from .measure import temp_bytes as temp_bytes
