"""Families of pretrained models, one file each."""

from .base import Family as Family
from .base import Tensor as Tensor
from .bert import BERT
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .t5 import T5
from .vit import VIT

# In the order in which they are tried for a model that was not converted: the plainest first.
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, GPT2, BERT, VIT, T5)}
