"""Passes of `passes`, each as one kernel that reads what it needs once. Pallas Triton.

A program takes some tokens of one clip, one after another; a row's statistics are worked out while
it is in registers. Backwards a program also adds up what is summed over tokens, and writes its sums
down once: gradients of biases, gates, scales, shifts and norms' weights cost no pass of their own.

A kernel for the GELU too was no faster than what XLA makes of it. ptxas 13.0 for sm_90 (jax 0.11.2
and 0.12.0.1): up to 120 registers for width 256, 232 for 1536; no spills.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as pltriton
import jax.numpy as jnp
from jaxtyping import Array, Float

from astraea_ports.wan.block import Rope
from astraea_ports.wan.training import programs

FORWARD, NORM_BACKWARD, HEADS_BACKWARD = 2, 24, 36
"""Tokens of a program: few, so that many run at once; backwards enough that sums are few, and for
the small model's batch of 128 on an H200 so many that the last programs don't run alone."""

A_WARP = 512
"""Numbers of a row that a warp takes. With more, or more rows at once, the sums fill so many
registers that too few programs run beside each other; a row of one warp is summed without waiting
for others."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def enter(
    tokens: Float[Array, "B N H"],
    scale: Float[Array, "B 1 H"],
    shift: Float[Array, "B 1 H"],
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H"]]:
    """Tokens as they are, and normed; as `passes.enter`."""
    return tokens, _norm(tokens, None, scale, shift, eps, interpret)[-1]


def _enter_forward(tokens, scale, shift, eps, interpret):
    return enter(tokens, scale, shift, eps, interpret), (tokens, scale)


def _enter_backward(eps, interpret, saved, gradients):
    tokens, scale = saved
    out, _, sums = _norm_backward(tokens, None, scale, gradients, eps, interpret)
    return out, sums[:, 0, None], sums[:, 1, None]


enter.defvjp(_enter_forward, _enter_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def add(
    tokens: Float[Array, "B N H"],
    gate: Float[Array, "B 1 H"],
    out: Float[Array, "B N H"],
    bias: Float[Array, " H"],
    scale: Float[Array, "B 1 H"],
    shift: Float[Array, "B 1 H"],
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H"]]:
    """`tokens + gate * (out + bias)`, and that normed; as `passes.add`."""
    total, normed = _norm(tokens, (gate, out, bias), scale, shift, eps, interpret)
    return total, normed


def _add_forward(tokens, gate, out, bias, scale, shift, eps, interpret):
    total, normed = add(tokens, gate, out, bias, scale, shift, eps, interpret)
    return (total, normed), (total, gate, out, bias, scale)


def _add_backward(eps, interpret, saved, gradients):
    total, gate, out, bias, scale = saved
    added = gate, out, bias
    tokens, out, sums = _norm_backward(total, added, scale, gradients, eps, interpret)
    scales, shifts, gates, biases = (sums[:, i, None] for i in range(4))
    return tokens, gates, out, (gate * biases).sum((0, 1)).astype(bias.dtype), scales, shifts


add.defvjp(_add_forward, _add_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def heads(
    projected: Float[Array, "B N X"],
    bias: Float[Array, " X"],
    weights: Float[Array, "T H"],
    rope: Rope | None,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], ...]:
    """What attention takes, part by part; as `passes.heads`."""
    width = weights.shape[-1]
    results = [(*projected.shape[:2], width)] * (projected.shape[-1] // width)
    body = functools.partial(programs.heads, len(weights), rope is not None, eps)
    call = _call(body, projected, width, results, 0, FORWARD, interpret, "training_heads")
    return tuple(call(projected, bias, weights, *(rope or ())))


def _heads_forward(projected, bias, weights, rope, eps, interpret):
    return heads(projected, bias, weights, rope, eps, interpret), (projected, bias, weights, rope)


def _heads_backward(eps, interpret, saved, gradients):
    projected, bias, weights, rope = saved
    body = functools.partial(programs.heads_backward, len(weights), rope is not None, eps)
    name = "training_heads_backward"
    count = len(gradients) + len(weights)
    results, tokens = [projected.shape], HEADS_BACKWARD
    call = _call(body, projected, weights.shape[-1], results, count, tokens, interpret, name)
    out, sums = call(projected, bias, weights, *(rope or ()), *gradients)
    biases, weight_sums = jnp.split(sums.sum((0, 1)), [len(gradients)])
    return (
        out,
        biases.reshape(-1).astype(bias.dtype),
        weight_sums.astype(weights.dtype),
        jax.tree.map(jnp.zeros_like, rope),
    )


heads.defvjp(_heads_forward, _heads_backward)


def _norm(tokens, added, scale, shift, eps, interpret):
    """Where something is added, the sum; always, that normed."""
    results = [tokens.shape] * (1 if added is None else 2)
    body = functools.partial(programs.norm, added is not None, eps)
    call = _call(body, tokens, tokens.shape[-1], results, 0, FORWARD, interpret, "training_norm")
    return call(tokens, *(added or ()), scale, shift)


def _norm_backward(tokens, added, scale, gradients, eps, interpret):
    """Gradients of the tokens, of what was added, and sums over a clip's tokens, [B, S, H]."""
    results = [tokens.shape] * (1 if added is None else 2)
    count = 2 * len(results)
    body = functools.partial(programs.norm_backward, added is not None, eps)
    name = "training_norm_backward"
    call = _call(body, tokens, tokens.shape[-1], results, count, NORM_BACKWARD, interpret, name)
    *out, sums = call(tokens, *(added or ()), scale, *gradients)
    return out[0], out[-1], sums.sum(1)


def _call(
    body: Callable,
    like: Array,
    width: int,
    shapes: Sequence[tuple[int, ...]],
    num_sums: int,
    each: int,
    interpret: bool,
    name: str,
) -> Callable:
    """A kernel whose programs take `each` tokens: results like some array, and float32 sums."""
    batch, num_tokens, _ = like.shape
    count = pl.cdiv(num_tokens, each)
    results = [jax.ShapeDtypeStruct(shape, like.dtype) for shape in shapes]
    if num_sums:
        results += [jax.ShapeDtypeStruct((batch, count, num_sums, width), jnp.float32)]
    warps = min(max(pl.next_power_of_2(width) // A_WARP, 1), 16)
    return pl.pallas_call(
        functools.partial(body, num_tokens),
        out_shape=results,
        grid=(count, batch),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )
