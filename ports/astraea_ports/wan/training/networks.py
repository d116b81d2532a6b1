"""What a Wan training trains, and which optimiser each of its weights goes by."""

from typing import NamedTuple

import jax

from astraea_ports.text.t5 import T5Encoder
from astraea_ports.wan.transformer import Transformer


class Networks(NamedTuple):
    """What is trained."""

    transformer: Transformer
    text_encoder: T5Encoder


def labels(networks: Networks) -> Networks:
    """A `recipe.Label` for each weight."""
    transformer = jax.tree.map(lambda _: "rest", networks.transformer)
    transformer.blocks = jax.tree.map(
        # Stacked over blocks: a matrix has three axes. The modulation tables are no matrices.
        lambda leaf: "matrix" if leaf.ndim == 3 and leaf.shape[1] > 6 else "rest",
        networks.transformer.blocks,
    )
    return Networks(transformer, jax.tree.map(lambda _: "text", networks.text_encoder))
