"""Token-wise acceleration of video diffusion transformers: ASTRAEA in JAX.

A schedule says what share of the tokens each denoising step computes, a selection says which,
and a cache gives the rest. The models live in `astraea_ports`.

The public names are listed in `__init__.pyi`. Each is imported when it is first asked for, so that
a command's help waits for no jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
