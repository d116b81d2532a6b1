"""What lies between the products of a training step, each with its backward pass written out.

A step's time goes to reading and writing activations, and what JAX derives reads them again and
again: a norm's gradient is written in float32 to be summed in a second pass, every bias and gate
is a pass of its own, and an activation leaves both its value and its slope. Written out, every
pass keeps its input and one number a row, sums what can be summed while it is read, and adds the
bias of the product before it. All arithmetic is in float32; what is written has the input's dtype.

The barriers say what is to be written down once: without them XLA works out a row's statistics in
the same pass as what they scale, row by row, which is half as fast for rows of 256.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Float

from astraea_ports.wan.block import Rope, rotate

_written = jax.lax.optimization_barrier


def product(x: Float[Array, "B N I"], kernel: Float[Array, "I O"]) -> Float[Array, "B N O"]:
    """`x @ kernel` over rows alone.

    With the batch as an axis of its own, XLA lays the tokens out channel by channel, for the sake
    of the kernel's gradient, and every norm becomes a sum over the slowest axis.
    """
    rows = _by_row(_by_row(x.reshape(-1, x.shape[-1])) @ kernel)
    return _gradient_once(rows).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _gradient_once(x: Array) -> Array:
    """The same values; their gradient is put together once, and not by each product that reads it.

    The product itself stays one that JAX knows, so that a policy can keep its result.
    """
    return x


_gradient_once.defvjp(lambda x: (x, None), lambda _, gradient: (_written(gradient),))


def _by_row(x: Array) -> Array:
    """The same values, laid out row by row, and so their gradient."""
    return with_layout_constraint(x, DeviceLayout(tuple(range(x.ndim))))


def enter(
    tokens: Float[Array, "B N H"],
    scale: Float[Array, "B 1 H"],
    shift: Float[Array, "B 1 H"],
    eps: float,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H"]]:
    """Tokens as they are, and normed: so that their gradients meet in one place."""
    return tokens, normed(tokens, scale, shift, eps)


def add(
    tokens: Float[Array, "B N H"],
    gate: Float[Array, "B 1 H"],
    out: Float[Array, "B N H"],
    bias: Float[Array, " H"],
    scale: Float[Array, "B 1 H"],
    shift: Float[Array, "B 1 H"],
    eps: float,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H"]]:
    """`add_gated`, and that `normed`: what lies between two sub-layers."""
    return enter(add_gated(tokens, gate, out, bias), scale, shift, eps)


def heads(
    projected: Float[Array, "B N X"],
    bias: Float[Array, " X"],
    weights: Float[Array, "T H"],
    rope: Rope | None,
    eps: float,
) -> tuple[Float[Array, "B N H"], ...]:
    """The parts of a projection, each with its bias; as many as have a weight are `turned`."""
    parts = projected.shape[-1] // weights.shape[-1]
    both = list(zip(jnp.split(projected, parts, -1), jnp.split(bias, parts), strict=True))
    normed = zip(both[: len(weights)], weights, strict=True)
    first = [turned(*part, weight, rope, eps) for part, weight in normed]
    return *first, *(biased(*part) for part in both[len(weights) :])


@jax.custom_vjp
def biased(x: Float[Array, "B N H"], bias: Float[Array, " H"]) -> Float[Array, "B N H"]:
    """`x + bias`; JAX would sum the bias's gradient in the dtype of `x`."""
    return x + bias


biased.defvjp(lambda x, bias: (x + bias, None), lambda _, gradient: (gradient, _total(gradient)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normed(
    tokens: Float[Array, "B N H"],
    scale: Float[Array, "B 1 H"],
    shift: Float[Array, "B 1 H"],
    eps: float,
) -> Float[Array, "B N H"]:
    """Layer norm of every token, times `1 + scale`, plus `shift`."""
    return _normed_forward(tokens, scale, shift, eps)[0]


def _normed_forward(tokens, scale, shift, eps):
    x = tokens.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    mean, factor = _written((mean, jax.lax.rsqrt(variance + eps)))
    out = (x - mean) * factor * (1 + scale) + shift
    return out.astype(tokens.dtype), (tokens, mean, factor, scale)


def _normed_backward(eps, saved, gradient):
    tokens, mean, factor, scale = saved
    x = (tokens.astype(jnp.float32) - mean) * factor
    gradient = gradient.astype(jnp.float32)
    inner = gradient * (1 + scale)
    even, along = _written((inner.mean(-1, keepdims=True), (inner * x).mean(-1, keepdims=True)))
    out = factor * (inner - even - x * along)
    # As one reduction, or each would read the gradient for itself.
    sums = jax.lax.reduce((gradient * x, gradient), (0.0, 0.0), _add_both, (1,))
    return out.astype(tokens.dtype), *(sum_[:, None] for sum_ in sums)


def _add_both(sums, values):
    return sums[0] + values[0], sums[1] + values[1]


normed.defvjp(_normed_forward, _normed_backward)


@jax.custom_vjp
def add_gated(
    tokens: Float[Array, "B N H"],
    gate: Float[Array, "B 1 H"],
    out: Float[Array, "B N H"],
    bias: Float[Array, " H"],
) -> Float[Array, "B N H"]:
    """`tokens + gate * (out + bias)`, rounded once."""
    total = tokens.astype(jnp.float32) + gate * (out.astype(jnp.float32) + bias)
    return total.astype(tokens.dtype)


def _add_gated_forward(tokens, gate, out, bias):
    return add_gated(tokens, gate, out, bias), (gate, out, bias)


def _add_gated_backward(saved, gradient):
    gate, out, bias = saved
    wide = gradient.astype(jnp.float32)
    total = wide.sum(1, keepdims=True)
    along = (wide * out.astype(jnp.float32)).sum(1, keepdims=True) + bias * total
    return (
        gradient,
        along,
        (gate * wide).astype(out.dtype),
        (gate * total).sum((0, 1)).astype(bias.dtype),
    )


add_gated.defvjp(_add_gated_forward, _add_gated_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "B N H"], bias: Float[Array, " H"]) -> Float[Array, "B N H"]:
    """The tanh GELU of `x + bias`."""
    return _gelu(x.astype(jnp.float32) + bias).astype(x.dtype)


_gelu = functools.partial(jax.nn.gelu, approximate=True)


def _gelu_forward(x, bias):
    return gelu(x, bias), (x, bias)


def _gelu_backward(saved, gradient):
    # Behind a barrier, or the forward pass would hand the slope over, as large as `x` itself.
    x, bias = _written(saved)
    _, pull = jax.vjp(_gelu, x.astype(jnp.float32) + bias)
    (out,) = pull(gradient.astype(jnp.float32))
    out = out.astype(x.dtype)
    return out, _total(out)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def turned(
    x: Float[Array, "B N H"],
    bias: Float[Array, " H"],
    weight: Float[Array, " H"],
    rope: Rope | None,
    eps: float,
) -> Float[Array, "B N H"]:
    """Root-mean-square norm of `x + bias`, times `weight`; each head turned by its angles."""
    return _turned_forward(x, bias, weight, rope, eps)[0]


def _turned_forward(x, bias, weight, rope, eps):
    wide = x.astype(jnp.float32) + bias
    factor = _written(jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps))
    out = _turn(wide * factor * weight, rope)
    return out.astype(x.dtype), (x, bias, weight, rope, factor)


def _turned_backward(eps, saved, gradient):
    x, bias, weight, rope, factor = saved
    back = None if rope is None else Rope(rope.cos, -rope.sin)
    gradient = _turn(gradient.astype(jnp.float32), back)
    normed = (x.astype(jnp.float32) + bias) * factor
    inner = gradient * weight
    along = _written((inner * normed).mean(-1, keepdims=True))
    out = (factor * (inner - normed * along)).astype(x.dtype)
    weight_sum = (gradient * normed).sum((0, 1)).astype(weight.dtype)
    return out, _total(out), weight_sum, jax.tree.map(jnp.zeros_like, rope)


turned.defvjp(_turned_forward, _turned_backward)


def _total(x: Float[Array, "B N H"]) -> Float[Array, " H"]:
    """The sum of all rows, of what is written: of what it is rounded from, XLA would write that."""
    return x.sum((0, 1), jnp.float32).astype(x.dtype)


def _turn(x: Float[Array, "B N H"], rope: Rope | None) -> Float[Array, "B N H"]:
    """Turns adjacent channels of each head; `rope` is the same for all."""
    if rope is None:
        return x
    heads = x.reshape(*x.shape[:-1], -1, 2 * rope.cos.shape[-1])
    return rotate(heads, rope).reshape(x.shape)
