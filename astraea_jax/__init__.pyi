"""The public names; `__init__.py` imports each when it is first asked for."""

from .attention import query_sparse_attention as query_sparse_attention
from .cache import TokenCache as TokenCache
from .denoise import Denoised as Denoised
from .flops import Workload as Workload
from .methods import Astraea as Astraea
from .methods import Dense as Dense
from .methods import FixedToken as FixedToken
from .methods import Method as Method
from .methods import StepLevel as StepLevel
from .model import Block as Block
from .model import VideoDiT as VideoDiT
from .schedule import Schedule as Schedule
from .selection import PUBLISHED as PUBLISHED
from .selection import SelectionConfig as SelectionConfig
from .solvers import Solver as Solver
from .solvers import euler as euler
from .solvers import unipc as unipc

__version__: str
