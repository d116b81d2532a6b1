"""The layers of the Wan VAE, channels last, its convolutions in the form that XLA runs fastest.

XLA has no fast 3-D convolution for few channels, on CPU or GPU; 2-D ones over frames folded into
the batch are several times faster. Times are of float32 on two CPU cores (JAX 0.12.0.1), compiled.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]


def conv2d(
    x: Float[Array, "*frames height width I"],
    kernel: Float[Array, "kh kw I O"],
    padding: Padding,
    stride: int = 1,
) -> Float[Array, "*frames out_height out_width O"]:
    """A 2-D convolution of every frame."""
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[-3:]),
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:-3], *y.shape[1:])


class Past:
    """The frames before a piece of a clip, that the causal layers still need.

    Layers ask for theirs in the order in which they run, and leave those for the next piece.

    Attributes:
      first: whether the piece starts the clip.
      kept: what the layers left for the next piece.
    """

    def __init__(self, before: Sequence[Array] | None = None):
        """`before` is what the piece before left in `kept`; None starts a clip."""
        self.first = before is None
        self.kept: list[Array] = []
        self._before = iter(before or ())

    def extend(
        self, x: Float[Array, "B F height width C"], frames: int
    ) -> Float[Array, "B G height width C"]:
        """The piece with some frames before it: the last ones, or zeros where the clip starts."""
        if self.first:
            longer = jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))
        else:
            longer = jnp.concatenate([next(self._before), x], 1)
        self.kept.append(longer[:, longer.shape[1] - frames :])
        return longer

    def with_last(
        self, x: Float[Array, "B F height width C"]
    ) -> Float[Array, "B G height width C"]:
        """The piece with the last frame before it, if there is one."""
        longer = x if self.first else jnp.concatenate([next(self._before), x], 1)
        self.kept.append(longer[:, -1:])
        return longer


def shifts(x: Float[Array, "B F height width C"], past: Past) -> list[Array]:
    """The frames two, one and no frames late, with zeros before the start."""
    longer = past.extend(x, 2)
    return [longer[:, i : i + x.shape[1]] for i in range(3)]


def causal_conv3d(
    x: Float[Array, "B F height width I"], kernel: Float[Array, "3 3 3 I O"], past: Past
) -> Float[Array, "B F height width O"]:
    """A 3x3x3 convolution, zeros around in space and before the first frame in time.

    As one 2-D convolution with the three times stacked on the channels: 121 ms for 33x128x128, 16
    to 16 channels, against 511 ms in 3-D.
    """
    num_in, num_out = kernel.shape[-2:]
    stacked = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, 3 * num_in, num_out)
    return conv2d(jnp.concatenate(shifts(x, past), -1), stacked, ((1, 1), (1, 1)))


def rms_norm(x: Float[Array, "*pixels C"], gamma: Float[Array, " C"]) -> Float[Array, "*pixels C"]:
    """Channels scaled to a root mean square of gamma; the norm has a floor of 1e-12, no epsilon."""
    wide = x.astype(jnp.float32)
    # The root of the larger square, not the larger root: finite gradients at zero.
    inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(wide), -1, keepdims=True), 1e-24))
    normed = (wide * (inverse * x.shape[-1] ** 0.5)).astype(x.dtype)
    return normed * jax.lax.broadcast_to_rank(gamma, x.ndim)


def norm_silu(x: Float[Array, "*pixels C"], gamma: Float[Array, " C"]) -> Float[Array, "*pixels C"]:
    """The norm and activation before each convolution."""
    return jax.nn.silu(rms_norm(x, gamma))


class Convolution(nnx.Module):
    """Kernel (spatial axes first, then in and out) and bias; its user says how to apply it."""

    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs):
        """Random kernel, zero bias."""
        initialise = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(initialise(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape[-1], jnp.float32))

    def causal(self, x: Array, past: Past) -> Array:
        """As a causal 3x3x3 convolution."""
        return self.plus_bias(causal_conv3d(x, self.kernel[...], past))

    def pointwise(self, x: Array) -> Array:
        """As a 1x1x1 convolution."""
        return self.plus_bias(x @ self.kernel[...])

    def plus_bias(self, x: Array) -> Array:
        """The bias added along the last axis."""
        return x + jax.lax.broadcast_to_rank(self.bias[...], x.ndim)


class Residual(nnx.Module):
    """Norm, SiLU, convolution, twice, added to the input (projected if the channels change)."""

    def __init__(self, num_in: int, num_out: int, rngs: nnx.Rngs):
        """Random weights."""
        self.norm1 = nnx.Param(jnp.ones(num_in, jnp.float32))
        self.conv1 = Convolution((3, 3, 3, num_in, num_out), rngs)
        self.norm2 = nnx.Param(jnp.ones(num_out, jnp.float32))
        self.conv2 = Convolution((3, 3, 3, num_out, num_out), rngs)
        self.shortcut = Convolution((num_in, num_out), rngs) if num_in != num_out else None

    def __call__(
        self, x: Float[Array, "B F height width I"], past: Past
    ) -> Float[Array, "B F height width O"]:
        """Applies the block."""
        y = self.conv1.causal(norm_silu(x, self.norm1[...]), past)
        y = self.conv2.causal(norm_silu(y, self.norm2[...]), past)
        return y + (x if self.shortcut is None else self.shortcut.pointwise(x))


class Attention(nnx.Module):
    """Self-attention of one head among the positions of each frame, added to the input."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        """Random weights."""
        self.norm = nnx.Param(jnp.ones(width, jnp.float32))
        self.qkv = Convolution((width, 3 * width), rngs)
        self.out = Convolution((width, width), rngs)

    def __call__(self, x: Float[Array, "B F height width C"]) -> Float[Array, "B F height width C"]:
        """Applies it, a frame at a time: at 480x832 one frame's scores are 156 MB."""
        qkv = self.qkv.pointwise(rms_norm(x, self.norm[...]))

        def attend(frame: Array) -> Array:
            q, k, v = jnp.split(frame, 3, -1)
            scores = (q @ k.T).astype(jnp.float32) * q.shape[-1] ** -0.5
            return jax.nn.softmax(scores, -1).astype(v.dtype) @ v

        frames = qkv.reshape(-1, x.shape[2] * x.shape[3], qkv.shape[-1])
        return x + self.out.pointwise(jax.lax.map(attend, frames).reshape(x.shape))


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        """Random weights."""
        self.blocks = nnx.List([Residual(width, width, rngs) for _ in range(2)])
        self.attention = Attention(width, rngs)

    def __call__(
        self, x: Float[Array, "B F height width C"], past: Past
    ) -> Float[Array, "B F height width C"]:
        """Applies the three."""
        return self.blocks[1](self.attention(self.blocks[0](x, past)), past)


class Down(nnx.Module):
    """Halves height and width, and also 2k+1 frames to k+1 if `temporal`."""

    def __init__(self, width: int, temporal: bool, rngs: nnx.Rngs):
        """Random weights."""
        self.spatial = Convolution((3, 3, width, width), rngs)
        self.time = Convolution((3, width, width), rngs) if temporal else None

    def __call__(
        self, x: Float[Array, "B F height width C"], past: Past
    ) -> Float[Array, "B f h w C"]:
        """Space first (zeros on the right and below only); the first frame stays in time."""
        x = conv2d(x, self.spatial.kernel[...], ((0, 1), (0, 1)), stride=2)
        x = self.spatial.plus_bias(x)
        if self.time is None:
            return x
        x = past.with_last(x)
        triples = jnp.concatenate([x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]], -1)
        kernel = self.time.kernel[...]
        later = self.time.plus_bias(triples @ kernel.reshape(-1, kernel.shape[-1]))
        return jnp.concatenate([x[:, :1], later], 1) if past.first else later


class Up(nnx.Module):
    """Doubles height and width and halves the channels; also k+1 frames to 2k+1 if `temporal`."""

    def __init__(self, width: int, temporal: bool, rngs: nnx.Rngs):
        """Random weights."""
        self.time = Convolution((3, width, 2 * width), rngs) if temporal else None
        self.spatial = Convolution((3, 3, width, width // 2), rngs)

    def __call__(
        self, x: Float[Array, "B F h w C"], past: Past
    ) -> Float[Array, "B f height width O"]:
        """Time first: the first frame stays as it is and is not seen by those after it."""
        if self.time is not None:
            first, rest = (x[:, :1], x[:, 1:]) if past.first else (x[:, :0], x)
            kernel = self.time.kernel[...]
            late = jnp.concatenate(shifts(rest, past), -1)
            pairs = self.time.plus_bias(late @ kernel.reshape(-1, kernel.shape[-1]))
            # The first half of the channels is the earlier of the two frames.
            both = jnp.stack(jnp.split(pairs, 2, -1), 2)
            rest = both.reshape(x.shape[0], 2 * rest.shape[1], *rest.shape[2:])
            x = jnp.concatenate([first, rest], 1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.spatial.plus_bias(conv2d(x, self.spatial.kernel[...], ((1, 1), (1, 1))))
