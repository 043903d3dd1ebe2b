"""Models over any coupling and plan, and `ReversibleStack` for modules of one's own."""

from .check import CheckReport as CheckReport
from .check import check as check
from .cost import flops_per_token as flops_per_token
from .cost import hardware_flops_per_token as hardware_flops_per_token
from .cost import kept_layers as kept_layers
from .cost import layer_forward_flops as layer_forward_flops
from .cost import num_params as num_params
from .cost import summary as summary
from .decoder import Decoder as Decoder
from .decoder_config import DecoderConfig as DecoderConfig
from .gradients import Report as Report
from .gradients import stacks_of as stacks_of
from .gradients import value_and_add_grad as value_and_add_grad
from .gradients import value_and_grad as value_and_grad
from .gradients import value_and_update as value_and_update
from .lora import Frozen as Frozen
from .lora import LoRAConfig as LoRAConfig
from .lora import add_adapters as add_adapters
from .lora import merge_adapters as merge_adapters
from .lora import without_adapters as without_adapters
from .presets import PRESETS as PRESETS
from .presets import preset as preset
from .stack import MutatedVariableError as MutatedVariableError
from .stack import ReversibleStack as ReversibleStack
