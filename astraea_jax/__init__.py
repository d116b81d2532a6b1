"""Token-wise acceleration of video diffusion transformers: ASTRAEA in JAX.

A schedule says what share of the tokens each denoising step computes, a selection says which,
and a cache gives the rest. The models live in `astraea_ports`.
"""

from astraea_jax.attention import query_sparse_attention as query_sparse_attention
from astraea_jax.cache import TokenCache as TokenCache
from astraea_jax.denoise import Denoised as Denoised
from astraea_jax.flops import Workload as Workload
from astraea_jax.methods import Astraea as Astraea
from astraea_jax.methods import Dense as Dense
from astraea_jax.methods import FixedToken as FixedToken
from astraea_jax.methods import Method as Method
from astraea_jax.methods import StepLevel as StepLevel
from astraea_jax.model import Block as Block
from astraea_jax.model import VideoDiT as VideoDiT
from astraea_jax.schedule import Schedule as Schedule
from astraea_jax.selection import PUBLISHED as PUBLISHED
from astraea_jax.selection import SelectionConfig as SelectionConfig
from astraea_jax.solvers import Solver as Solver
from astraea_jax.solvers import euler as euler
from astraea_jax.solvers import unipc as unipc

__version__ = "0.1.0"
