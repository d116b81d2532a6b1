"""Which implementation runs where, and how a kernel is called: by name, platform and gradient."""

import functools
import importlib
import types
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from astraea_jax.checks import Refusal
from astraea_jax.kernels import backward, rows
from astraea_jax.kernels.machine import Gpu, gpu

Implementation = Literal["xla", "cudnn", "triton", "mosaic"]
MODULES = {"cudnn": "cudnn", "triton": "ampere", "mosaic": "hopper"}
"""Implementation -> its module in this folder; imported only where there is a GPU to run it."""


def implementations() -> dict[str, str]:
    """Which implementations run on this machine: name -> "runs", or the reason why not."""
    here = gpu()
    reasons = {name: refusal(name, here, 128, jnp.bfloat16) for name in get_args(Implementation)}
    return {name: reason or "runs" for name, reason in reasons.items()}


def refusal(name: str, here: Gpu | None, width: int, dtype, numbers: int = 0) -> str | None:
    """Why an implementation can't run on a GPU; None if it can.

    Args:
      name: the implementation.
      here: the GPU; None where there is none.
      width: of a head.
      dtype: of queries, keys and values.
      numbers: in the largest of them.
    """
    if name == "xla":
        return None
    if here is None:
        return f"needs an NVIDIA GPU; this process has {jax.devices()[0].device_kind}"
    try:
        module = kernel_module(name)
    except ImportError as error:
        return f"this JAX has no such back end ({error})"
    most = getattr(module, "MOST_NUMBERS", numbers)
    if numbers > most:
        return (
            f"takes arrays of at most {most} numbers; got {numbers}: split the batch or the heads"
        )
    return module.refusal(here, width, dtype)


def kernel_module(name: str) -> types.ModuleType:
    """The module in kernels/ that has an implementation; imported when first asked for."""
    return importlib.import_module(f"astraea_jax.kernels.{MODULES[name]}")


def preferred(here: Gpu | None, num_queries: int, num_keys: int) -> tuple[Implementation, ...]:
    """Implementations to try where none is named, best first; by notebooks/studies/attention.json.

    On Hopper the order is as measured; on others Triton comes first, without a measurement.
    """
    if here is None:
        return ("xla",)
    if here.capability[0] != 9:
        return ("triton", "cudnn", "xla")
    if num_queries <= 64 or num_keys <= 64:
        # A tile of Mosaic's is 128 queries or more and as many keys: most of it would be waste.
        return ("triton", "cudnn", "mosaic", "xla")
    return ("mosaic", "cudnn", "triton", "xla")


class Settings(NamedTuple):
    """What is compiled in.

    Attributes:
      name: the implementation.
      scale: factor on the logits.
      reference: what runs on other platforms than CUDA, whichever the program is lowered for; None
        for the implementation itself.
    """

    name: Implementation
    scale: float
    reference: Callable | None


def _first_that_runs(names, here: Gpu | None, width: int, dtype, numbers=0) -> Implementation:
    """The first that has no reason against it; says once what was passed over."""
    reasons = {}
    for name in names:
        reasons[name] = refusal(name, here, width, dtype, numbers)
        if reasons[name] is None:
            break
    chosen = list(reasons)[-1]
    # float32 is for exactness: nobody expects a tensor-core kernel to take it.
    if len(reasons) > 1 and dtype != jnp.float32:
        passed = "; ".join(f"{name} {reason}" for name, reason in reasons.items() if reason)
        _say_once(f"attention falls back to {chosen}: {passed}")
    return chosen


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=6)


def choose(
    implementation: Implementation | None, q, k, num_queries: int
) -> tuple[Implementation, bool]:
    """The implementation to run, and whether only on CUDA, xla taking other platforms' part.

    Raises:
      Refusal: a named implementation that is unknown or can't run, with the reason.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise Refusal(
            f"implementation must be None or one of {', '.join(get_args(Implementation))}; "
            f"got {implementation!r}"
        )
    here, width = gpu(), q.shape[-1]
    limits = (here, width, jnp.dtype(k.dtype), max(q.size, k.size))
    if implementation is None:
        return _first_that_runs(preferred(here, num_queries, k.shape[1]), *limits), True
    reason = refusal(implementation, *limits)
    if reason is not None:
        raise Refusal(f"implementation {implementation!r} can't run: it {reason}")
    return implementation, False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings: Settings, q, k, v, count, indices):
    """A kernel, with a gradient."""
    kernel = functools.partial(_run_kernel, settings)
    if settings.reference is None:
        return kernel(q, k, v, count, indices)
    reference = functools.partial(settings.reference, scale=settings.scale)
    return lax.platform_dependent(q, k, v, count, indices, cuda=kernel, default=reference)


def _run_kernel(settings: Settings, q, k, v, count, indices):
    module = kernel_module(settings.name)
    if settings.name == "triton":  # it gathers by itself
        return module.attend(q, k, v, count, indices, scale=settings.scale)
    if indices is not None:
        q = rows.take(q, indices)
    return module.attend(q, k, v, count, scale=settings.scale)


def _attend_forward(settings: Settings, q, k, v, count, indices):
    out, lse = attend(settings, q, k, v, count, indices)
    return (out, lse), (q, k, v, count, indices, out, lse)


def _attend_backward(settings: Settings, saved, gradients):
    q, k, v, _, indices, out, lse = saved
    taken = q if indices is None else rows.take(q, indices)
    taken, k, v = backward.gradient(taken, k, v, out, lse, *gradients, scale=settings.scale)
    if indices is not None:
        batch = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
        taken = jnp.zeros_like(q).at[batch, jnp.minimum(indices, q.shape[1] - 1)].add(taken)
    return taken, k, v, None, None


attend.defvjp(_attend_forward, _attend_backward)
