"""The reversible core: couplings, plans, and the scan. Only jax is imported here."""

from .chunks import by_tokens as by_tokens
from .coupling import BDIA as BDIA
from .coupling import AbstractCoupling as AbstractCoupling
from .coupling import Leapfrog as Leapfrog
from .coupling import LinearCoupling as LinearCoupling
from .coupling import Midpoint as Midpoint
from .coupling import Momentum as Momentum
from .coupling import NearResidual as NearResidual
from .coupling import Residual as Residual
from .coupling import RevNet as RevNet
from .coupling import parse_coupling as parse_coupling
from .layers import Run as Run
from .pin import pin as pin
from .plan import All as All
from .plan import Inputs as Inputs
from .plan import Parts as Parts
from .plan import Reverse as Reverse
from .rebuild import reconstruction_error as reconstruction_error
from .scan import ScanResult as ScanResult
from .scan import reversible_scan as reversible_scan
from .streams import FixedPoint as FixedPoint
