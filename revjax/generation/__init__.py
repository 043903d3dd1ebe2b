"""Generation: from a model and a prompt to more tokens."""

from .decode import generate as generate
from .sampling import sample as sample
