"""Generation: from a model and a prompt to more tokens."""

from .decode import generate as generate
from .decode import stream as stream
from .sampling import Sampling as Sampling
from .sampling import sample as sample
