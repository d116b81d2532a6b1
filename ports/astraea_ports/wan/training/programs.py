"""What the kernels of `kernels` do with a row: one program each, forwards or backwards."""

from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as pltriton
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Row:
    """A token's place, and what its numbers are."""

    def __init__(self, width: int, clip: Array, token: Array):
        self.width, self.clip, self.token = width, clip, token
        self.columns = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
        self.mask = None if len(self.columns) == width else self.columns < width

    def load(self, ref, part: int = 0) -> Array:
        """A row of [B, N, X], or a part of it, in float32; zero past the width."""
        return self._load(ref.at[self.clip, self.token, part * self.width + self.columns])

    def store(self, ref, values: Array, part: int = 0) -> None:
        """Writes a row of [B, N, X], or a part of it."""
        at = ref.at[self.clip, self.token, part * self.width + self.columns]
        pltriton.store(at, values.astype(ref.dtype), mask=self.mask)

    def of_clip(self, ref) -> Array:
        """The clip's row of [B, 1, H]."""
        return self._load(ref.at[self.clip, 0, self.columns])

    def of_part(self, ref, part: int) -> Array:
        """A part of [X]."""
        return self._load(ref.at[part * self.width + self.columns])

    def of_weights(self, ref, part: int) -> Array:
        """A row of [T, H]."""
        return self._load(ref.at[part, self.columns])

    def _load(self, at) -> Array:
        other = None if self.mask is None else 0.0
        return pltriton.load(at, mask=self.mask, other=other).astype(jnp.float32)

    def mean(self, values: Array) -> Array:
        """Over the width, where there are zeros past it."""
        return values.sum() / self.width

    def normed(self, x: Array, eps: float) -> tuple[Array, Array]:
        """Of mean 0 and variance 1, and the factor that made it so."""
        x = x - self.mean(x)
        if self.mask is not None:
            x = jnp.where(self.mask, x, 0.0)
        factor = lax.rsqrt(self.mean(x * x) + eps)
        return x * factor, factor

    def angles(self, cos_ref, sin_ref) -> tuple[Array, Array]:
        """Of the token's pairs of channels, head by head."""
        pairs = jnp.arange(len(self.columns) // 2, dtype=jnp.int32) % cos_ref.shape[-1]
        at = self.token, pairs
        return pltriton.load(cos_ref.at[at]), pltriton.load(sin_ref.at[at])


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    """Adjacent channels turned by their angles."""
    even, odd = lax.split(x.reshape(-1, 2), (1, 1), axis=1)
    even, odd = even.reshape(-1), odd.reshape(-1)
    turned = even * cos - odd * sin, odd * cos + even * sin
    return jnp.concatenate([each[:, None] for each in turned], axis=1).reshape(-1)


def norm(adds, eps, num_tokens, *refs):
    """Forwards."""
    if adds:
        tokens_ref, gate_ref, out_ref, bias_ref, scale_ref, shift_ref, total_ref, normed_ref = refs
    else:
        tokens_ref, scale_ref, shift_ref, normed_ref = refs

    def step(row: Row) -> tuple[()]:
        x = row.load(tokens_ref)
        if adds:
            out = row.load(out_ref) + row.of_part(bias_ref, 0)
            total = x + row.of_clip(gate_ref) * out
            row.store(total_ref, total)
            x = total.astype(total_ref.dtype).astype(jnp.float32)  # the norm is of what is written
        x, _ = row.normed(x, eps)
        row.store(normed_ref, x * (1 + row.of_clip(scale_ref)) + row.of_clip(shift_ref))
        return ()

    each_token(num_tokens, tokens_ref.shape[-1], step)


def norm_backward(adds, eps, num_tokens, *refs):
    """Backwards: sums for scale and shift, and where something was added for gate and bias."""
    if adds:
        tokens_ref, gate_ref, added_ref, bias_ref, scale_ref, *refs = refs
        kept_ref, gradient_ref, out_ref, out_added_ref, sums_ref = refs
    else:
        tokens_ref, scale_ref, kept_ref, gradient_ref, out_ref, sums_ref = refs

    def step(row: Row) -> tuple[Array, ...]:
        # All is read before anything is written: a load that may alias a store waits for it.
        x, gradient, kept = (row.load(ref) for ref in (tokens_ref, gradient_ref, kept_ref))
        added = row.load(added_ref) if adds else None
        x, factor = row.normed(x, eps)
        inner = gradient * (1 + row.of_clip(scale_ref))
        out = kept + factor * (inner - row.mean(inner) - x * row.mean(inner * x))
        row.store(out_ref, out)
        if added is None:
            return gradient * x, gradient
        row.store(out_added_ref, row.of_clip(gate_ref) * out)
        return gradient * x, gradient, out * (added + row.of_part(bias_ref, 0)), out

    each_token(num_tokens, tokens_ref.shape[-1], step, sums_ref)


def heads(num_normed, turns, eps, num_tokens, projected_ref, bias_ref, weights_ref, *refs):
    """Forwards."""
    rope, refs = (refs[:2], refs[2:]) if turns else ((), refs)

    def step(row: Row) -> tuple[()]:
        values = [row.load(projected_ref, part) for part in range(len(refs))]
        angles = row.angles(*rope) if turns else None
        for part, ref in enumerate(refs):
            x = values[part] + row.of_part(bias_ref, part)
            if part < num_normed:
                factor = lax.rsqrt(row.mean(x * x) + eps)
                x = x * factor * row.of_weights(weights_ref, part)
                x = x if angles is None else _turn(x, *angles)
            row.store(ref, x)
        return ()

    each_token(num_tokens, weights_ref.shape[-1], step)


def heads_backward(num_normed, turns, eps, num_tokens, projected_ref, bias_ref, weights_ref, *refs):
    """Backwards: sums for the parts' biases, then for the norms' weights."""
    rope, refs = (refs[:2], refs[2:]) if turns else ((), refs)
    *gradient_refs, out_ref, sums_ref = refs

    def step(row: Row) -> tuple[Array, ...]:
        gradients = [row.load(ref) for ref in gradient_refs]
        values = [row.load(projected_ref, part) for part in range(num_normed)]
        angles = row.angles(*rope) if turns else None
        biases, weights = [], []
        for part, gradient in enumerate(gradients):
            if part < num_normed:
                if angles is not None:
                    gradient = _turn(gradient, angles[0], -angles[1])
                x = values[part] + row.of_part(bias_ref, part)
                factor = lax.rsqrt(row.mean(x * x) + eps)
                x = x * factor
                weights.append(gradient * x)
                inner = gradient * row.of_weights(weights_ref, part)
                gradient = factor * (inner - x * row.mean(inner * x))
            row.store(out_ref, gradient, part)
            biases.append(gradient)
        return *biases, *weights

    each_token(num_tokens, weights_ref.shape[-1], step, sums_ref)


def each_token(num_tokens: int, width: int, step: Callable, *sums_refs) -> None:
    """A program's tokens one after another; what each gives is added up and written to `sums_refs`.

    It takes every so many tokens, so that programs beside each other read what lies side by side.
    """
    first, clip, programs = pl.program_id(0), pl.program_id(1), pl.num_programs(0)

    def add(index, sums):
        more = step(Row(width, clip, first + index * programs))
        return tuple(a + b for a, b in zip(sums, more, strict=True))

    columns = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    num_sums = sum(ref.shape[2] for ref in sums_refs)
    count = (num_tokens - first + programs - 1) // programs
    sums = lax.fori_loop(0, count, add, (jnp.zeros(len(columns), jnp.float32),) * num_sums)
    mask = None if len(columns) == width else columns < width
    for ref in sums_refs:
        for index, each in enumerate(sums):
            pltriton.store(ref.at[clip, first, index, columns], each, mask=mask)
