"""Reversible transformers in JAX and Flax NNX: activation memory flat in depth, gradients right to the bit."""

from .core import BDIA as BDIA
from .core import AbstractCoupling as AbstractCoupling
from .core import Leapfrog as Leapfrog
from .core import LinearCoupling as LinearCoupling
from .core import Midpoint as Midpoint
from .core import Momentum as Momentum
from .core import NearResidual as NearResidual
from .core import Residual as Residual
from .core import RevNet as RevNet
from .core import Run as Run
from .core import ScanResult as ScanResult
from .core import parse_coupling as parse_coupling
from .core import reversible_scan as reversible_scan
from .models import CheckReport as CheckReport
from .models import Decoder as Decoder
from .models import DecoderConfig as DecoderConfig
from .models import Encoder as Encoder
from .models import EncoderConfig as EncoderConfig
from .models import EncoderDecoder as EncoderDecoder
from .models import EncoderDecoderConfig as EncoderDecoderConfig
from .models import Report as Report
from .models import ReversibleStack as ReversibleStack
from .models import VisionConfig as VisionConfig
from .models import VisionTransformer as VisionTransformer
from .models import check as check
from .models import preset as preset
from .models import value_and_add_grad as value_and_add_grad
from .models import value_and_grad as value_and_grad
from .models import value_and_update as value_and_update

__version__ = "0.1.0"
