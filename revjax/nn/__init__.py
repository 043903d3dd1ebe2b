"""Layers: Flax NNX modules, and the pure functions under them. They return f(x), never x + f(x).

    B batch        T query time    S key time    D d_model        F mlp width    V vocab
    N heads        K kv heads      G queries per kv head          H head dim

Parameters are fp32, fan-in normal; results have the module's `dtype`. No module draws random numbers
after construction: dropout takes a key, and `key=None` is evaluation.
"""

from .attention import Attention as Attention
from .attention import attention as attention
from .cache import KVCache as KVCache
from .cross_entropy import cross_entropy as cross_entropy
from .dropout import dropout as dropout
from .dropout import stochastic_depth as stochastic_depth
from .embedding import Embedding as Embedding
from .embedding import LearnedPositions as LearnedPositions
from .flash import flash_attention as flash_attention
from .flash import flash_attention_with_lse as flash_attention_with_lse
from .linear import Linear as Linear
from .linear import LowRank as LowRank
from .mlp import MLP as MLP
from .norm import LayerNorm as LayerNorm
from .norm import RMSNorm as RMSNorm
from .relative import relative_bias as relative_bias
from .rope_scaling import RopeScaling as RopeScaling
from .rotary import Rotary as Rotary
from .rotary import rotary as rotary
