"""Parts of random weights: a model of a real size, to time."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from astraea_ports import checkpoints


class RandomWeights[M](NamedTuple):
    """A module that is made, leaf by leaf, of random numbers of a sane scale.

    Attributes:
      template: the module with shapes and dtypes for leaves.
      seed: of the numbers.
      stacked: the beginnings of the paths whose leaves hold a row for each block.
    """

    template: M
    seed: int
    stacked: tuple[str, ...] = ("blocks.",)

    def load(self) -> M:
        """The module: norms are 1, biases 0, and a product keeps the size of what goes in."""
        key, arrays = jax.random.key(self.seed), []
        for index, (path, slot) in enumerate(checkpoints.parameter_shapes(self.template).items()):
            own = slot.shape[1:] if path.startswith(self.stacked) else slot.shape
            value = _random(jax.random.fold_in(key, index), path, slot, own)
            arrays.append(jax.block_until_ready(value))  # one at a time: their scratch space is
        return jax.tree.unflatten(jax.tree.structure(self.template), arrays)


def _random(key, path: str, slot: jax.ShapeDtypeStruct, own: tuple[int, ...]) -> jax.Array:
    name = path.rsplit(".", 1)[-1]
    if name == "bias":
        return jnp.zeros(slot.shape, slot.dtype)
    if len(own) == 1:
        return jnp.ones(slot.shape, slot.dtype)
    fan_in = own[-1] if name == "scale_shift_table" else math.prod(own[:-1])
    scale = 1.0 if name == "embedding" else fan_in**-0.5
    return _normal(key, slot.shape, slot.dtype, scale)


_normal = jax.jit(
    lambda key, shape, dtype, scale: (jax.random.normal(key, shape, jnp.float32) * scale).astype(
        dtype
    ),
    static_argnums=(1, 2),
)
