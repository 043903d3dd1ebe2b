"""Claims, measured beside their rivals in one run: exactness, memory, speed."""

from .exactness import exactness_table as exactness_table
from .memory import decoder_memory_table as decoder_memory_table
from .memory import stack_memory_table as stack_memory_table
from .speed import SpeedConfig as SpeedConfig
from .speed import speed_table as speed_table
