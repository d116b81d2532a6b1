"""What a compiled program holds, and what of a cache it copies."""

import re

import jax
import numpy as np


def facts(program, state) -> dict[str, int]:
    """Bytes that a program and a method's state take, and the copies that it makes of the latter.

    Args:
      program: compiled.
      state: the method's pytree; of it, arrays [L, B, N, ...] are looked for among the copies.
    """
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    leaves = jax.tree.leaves(state)
    large = [leaf for leaf in leaves if leaf.ndim == 4 and leaf.shape[0] > 1]
    text = program.as_text() or ""
    return {
        "peak": held,
        "copies": sum(count_copies(text, leaf) for leaf in large),
        "cache": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    }


def count_copies(text: str, leaf: jax.ShapeDtypeStruct | jax.Array) -> int:
    """Copies, in an optimised program, of an array of this shape."""
    short = {"bfloat16": "bf16", "float32": "f32"}.get(str(np.dtype(leaf.dtype)), "")
    shape = ",".join(map(str, leaf.shape))
    found = re.compile(rf"= \(?{short}\[{shape}\].* (copy|copy-start)\(")
    return sum(bool(found.search(line)) for line in text.splitlines())
