"""Loading a Wan transformer's weights: the table from checkpoint keys to parameters."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from astraea_ports import checkpoints
from astraea_ports.checkpoints import Entry
from astraea_ports.wan.transformer import Transformer, TransformerConfig

_CONDITION = r"condition_embedder\."
_BLOCK = r"blocks\.(?P<layer>\d+)\."


def _patches(array: np.ndarray) -> np.ndarray:
    """[out, in, frame, row, column] -> [(frame, row, column, in), out], as patches are cut."""
    return checkpoints.conv3d(array).reshape(-1, array.shape[0])


def _first(array: np.ndarray) -> np.ndarray:
    """[1, ...] -> [...]."""
    return array[0]


def _linear(key: str, path: str) -> tuple[Entry, Entry]:
    kernel = Entry(key + r"\.weight", path + ".kernel", checkpoints.linear)
    return kernel, Entry(key + r"\.bias", path + ".bias")


TABLE = (
    Entry(r"patch_embedding\.weight", "patch_embedding.kernel", _patches),
    Entry(r"patch_embedding\.bias", "patch_embedding.bias"),
    *_linear(_CONDITION + r"(text|time)_embedder\.linear_([12])", r"\1_\2"),
    *_linear(_CONDITION + "time_proj", "time_proj"),
    Entry(_BLOCK + "scale_shift_table", "blocks.scale_shift_table", _first),
    *_linear(_BLOCK + r"(?P<a>attn[12])\.(?P<p>to_[qkv])", r"blocks.\g<a>.\g<p>"),
    *_linear(_BLOCK + r"(?P<a>attn[12])\.to_out\.0", r"blocks.\g<a>.to_out"),
    Entry(_BLOCK + r"(?P<a>attn[12])\.(?P<n>norm_[qk])\.weight", r"blocks.\g<a>.\g<n>.weight"),
    Entry(_BLOCK + r"norm2\.weight", "blocks.norm2.scale"),
    Entry(_BLOCK + r"norm2\.bias", "blocks.norm2.bias"),
    *_linear(_BLOCK + r"ffn\.net\.0\.proj", "blocks.ffn_in"),
    *_linear(_BLOCK + r"ffn\.net\.2", "blocks.ffn_out"),
    *_linear("proj_out", "proj_out"),
    Entry("scale_shift_table", "scale_shift_table", _first),
)
"""Diffusers' keys. The cross-attention's norm is norm2 there (norm3 in the original layout)."""


def load_transformer(
    source: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Transformer:
    """Loads a Wan transformer in the Diffusers layout.

    Args:
      source: a folder with config.json and the weights, or a single .safetensors file.
      config: what config.json holds; needed with a single file.
      dtype: of the parameters and of the tokens.

    Raises:
      ValueError: the config or the weights are missing, broken, or don't fit.
    """
    if config is None:
        if Path(source).is_file():
            raise ValueError(
                f"{source} has no config.json beside it; pass config={{...}} or a folder"
            )
        config = checkpoints.read_config(source, expected="WanTransformer3DModel")
    parsed = TransformerConfig.from_dict(config)
    template = jax.eval_shape(lambda: Transformer(parsed, nnx.Rngs(0)))
    return checkpoints.load_parameters(source, template, TABLE, dtype=dtype)
