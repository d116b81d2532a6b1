"""Loading a Wan transformer's weights: the table from checkpoint keys to parameters."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from astraea_jax.checks import Refusal
from astraea_ports import checkpoints
from astraea_ports.checkpoints import Entry
from astraea_ports.checkpoints import lora as lora_files
from astraea_ports.checkpoints.lora_names import Words
from astraea_ports.wan import contents
from astraea_ports.wan.transformer import Precision, Transformer, TransformerConfig, with_policy

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

ORIGINAL = (
    Entry(r"patch_embedding\.weight", "patch_embedding.kernel", _patches),
    Entry(r"patch_embedding\.bias", "patch_embedding.bias"),
    *_linear(r"(text|time)_embedding\.0", r"\1_1"),
    *_linear(r"(text|time)_embedding\.2", r"\1_2"),
    *_linear(r"time_projection\.1", "time_proj"),
    Entry(_BLOCK + "modulation", "blocks.scale_shift_table", _first),
    *_linear(_BLOCK + r"self_attn\.(?P<p>[qkv])", r"blocks.attn1.to_\g<p>"),
    *_linear(_BLOCK + r"cross_attn\.(?P<p>[qkv])", r"blocks.attn2.to_\g<p>"),
    *_linear(_BLOCK + r"self_attn\.o", "blocks.attn1.to_out"),
    *_linear(_BLOCK + r"cross_attn\.o", "blocks.attn2.to_out"),
    Entry(_BLOCK + r"self_attn\.(?P<n>norm_[qk])\.weight", r"blocks.attn1.\g<n>.weight"),
    Entry(_BLOCK + r"cross_attn\.(?P<n>norm_[qk])\.weight", r"blocks.attn2.\g<n>.weight"),
    Entry(_BLOCK + r"norm3\.weight", "blocks.norm2.scale"),
    Entry(_BLOCK + r"norm3\.bias", "blocks.norm2.bias"),
    *_linear(_BLOCK + r"ffn\.0", "blocks.ffn_in"),
    *_linear(_BLOCK + r"ffn\.2", "blocks.ffn_out"),
    *_linear(r"head\.head", "proj_out"),
    Entry(r"head\.modulation", "scale_shift_table", _first),
)
"""The original's keys."""


LORA_WORDS = Words(
    compound=(
        *("self_attn", "cross_attn", "norm_q", "norm_k", "to_q", "to_k", "to_v", "to_out"),
        *("patch_embedding", "text_embedding", "time_embedding", "time_projection", "proj_out"),
        *("condition_embedder", "text_embedder", "time_embedder", "time_proj"),
        *("linear_1", "linear_2", "k_img", "v_img", "img_emb"),
    ),
    whole=("modulation", "scale_shift_table"),
    others=(
        (r"(^|\.)transformer_2\.|(high|low)_noise", "a LoRA of Wan 2.2, for its two experts"),
        (
            r"[kv]_img|img_emb|image_embedder|add_[kv]_proj|added_[kv]",
            "a LoRA of an image-to-video Wan",
        ),
        (r"vace_", "a LoRA of a Wan with VACE"),
    ),
    size="this size of Wan",
)
"""Of the names that a LoRA's file has for this model's weights."""


def transformer_template(
    config: TransformerConfig, *, dtype: DTypeLike, precision: Precision
) -> Transformer:
    """A transformer of shapes alone, each parameter in the dtype that the policy gives it.

    Raises:
      Refusal: an unknown policy.
    """
    if precision not in get_args(Precision):
        known = " or ".join(get_args(Precision))
        raise Refusal(f"precision must be {known}; got {precision!r}")
    template = jax.eval_shape(lambda: Transformer(config, nnx.Rngs(0), precision=precision))
    return with_policy(template, dtype)


def open_transformer(
    source: checkpoints.Source,
    *,
    config: Mapping[str, Any] | TransformerConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    precision: Precision = "reference",
    lora: Sequence[lora_files.Lora] = (),
    revision: str | None = None,
) -> checkpoints.Loadable[Transformer]:
    """Finds a transformer and holds its headers against its config; see `load_transformer`."""
    lora = lora_files.check(lora)
    checkpoints.float_dtype(dtype)
    if isinstance(config, TransformerConfig):
        config = config.to_dict()
    place = checkpoints.find_part(
        source,
        folder="transformer",
        kinds=("WanTransformer3DModel", "WanModel"),
        config=config,
        revision=revision,
    )
    if place.folder:
        contents.check_index(place.model.path)  # one expert of two is not the model
    parsed = TransformerConfig.from_dict(place.config, name=f"the transformer's config of {source}")
    template = transformer_template(parsed, dtype=dtype, precision=precision)
    deltas = functools.partial(lora_files.read_deltas, lora, words=LORA_WORDS) if lora else None
    return checkpoints.open_checkpoint(place.weights(), template, TABLE, ORIGINAL, deltas=deltas)


def load_transformer(
    source: checkpoints.Source,
    *,
    config: Mapping[str, Any] | TransformerConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    precision: Precision = "reference",
    lora: Sequence[lora_files.Lora] = (),
    revision: str | None = None,
) -> Transformer:
    """Loads a Wan transformer in Diffusers' layout or the original one.

    Args:
      source: a folder with config.json and the weights, a whole model's folder or hub id, or a
        single file of weights (.safetensors; .pth where torch is installed).
      config: what config.json holds, under Diffusers' names or the original's, or one of
        `CONFIGS`; needed with a file that has none beside it.
      dtype: of the large products' weights.
      precision: what stays float32 where `dtype` is narrower; see `transformer.Precision`.
      lora: files of low-rank changes and their strengths, merged while the weights are read.
      revision: of a hub id: a branch, a tag or a commit.

    Raises:
      Refusal: the config or the weights are missing, broken, or don't fit.
    """
    return open_transformer(
        source, config=config, dtype=dtype, precision=precision, lora=lora, revision=revision
    ).load()
