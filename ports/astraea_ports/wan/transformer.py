"""The Wan 2.1 text-to-video transformer: flax modules that hold only parameters.

Of weights in bfloat16, precision "reference" leaves in float32: the tokens between sub-layers (the
residual stream), time embedding, modulation, norms and head, as the original's autocast does.
"fast" is the same but for the tokens, which are rounded to the weights' dtype after each sub-layer,
as in Diffusers; half the traffic. What is kept from step to step has the weights' dtype under
either.

Source: Wan-Video/Wan2.1 wan/modules/model.py; Diffusers transformer_wan (key names).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from astraea_jax import checks
from astraea_jax import model as core
from astraea_jax.checks import ListOf, Refusal, Whole
from astraea_jax.flops import BlockSizes, Workload
from astraea_ports import checkpoints
from astraea_ports.checkpoints import Precision
from astraea_ports.wan.block import Block, BoundBlock, KeysValues, Rope, rope_tables
from astraea_ports.wan.config import TransformerConfig as TransformerConfig

WIDE = ("time_1", "time_2", "time_proj", "scale_shift_table", "norm", "proj_out")
"""Parameters that stay float32 under either policy: 1 % of the model, by parts of their paths."""


class Prepared(NamedTuple):
    """What stays the same through a run."""

    text: KeysValues  # of every block: a leading axis L
    rope: Rope


class TimeModulation(NamedTuple):
    """A step's time embedding [B, H] (for the head) and its projection [B, 6, H] (for blocks)."""

    embedding: Array
    projected: Array


class Transformer(nnx.Module):
    """Wan 2.1: patches of a noised video latent and a text in, velocity out; a core.VideoDiT."""

    def __init__(
        self, config: TransformerConfig, rngs: nnx.Rngs, *, precision: Precision = "reference"
    ):
        width, patch = config.width, int(np.prod(config.patch_size))
        self.config, self.precision = config, precision
        exact = jax.lax.Precision.HIGHEST  # a GPU's default rounds float32 products to 10 bits
        self.patch_embedding = nnx.Linear(patch * config.in_channels, width, rngs=rngs)
        self.text_1 = nnx.Linear(config.text_dim, width, rngs=rngs)
        self.text_2 = nnx.Linear(width, width, rngs=rngs)
        self.time_1 = nnx.Linear(config.freq_dim, width, precision=exact, rngs=rngs)
        self.time_2 = nnx.Linear(width, width, precision=exact, rngs=rngs)
        self.time_proj = nnx.Linear(width, 6 * width, precision=exact, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
        num_out = patch * config.out_channels
        self.proj_out = nnx.Linear(width, num_out, precision=exact, rngs=rngs)
        table = jax.random.normal(rngs.params(), (2, width), jnp.float32) / width**0.5
        self.scale_shift_table = nnx.Param(table)

    def __call__(
        self,
        latents: Float[Array, "B F Y X C"],
        timestep: Float[Array, "B"],
        context: Float[Array, "B M D"],
    ) -> Float[Array, "B F Y X C"]:
        """Velocity of latents at a timestep in 0..1000, given the text padded to its length."""
        return core.dense_forward(self, latents, timestep, context)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the tokens between sub-layers."""
        return jnp.dtype(jnp.float32) if self.precision == "reference" else self.cache_dtype

    @property
    def cache_dtype(self) -> jnp.dtype:
        """Dtype of what is kept of the tokens from step to step: that of the large products."""
        return self.patch_embedding.kernel.dtype

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make a token."""
        return self.config.patch_size

    def workload(self, latents_shape: tuple[int, ...], text_tokens: int) -> Workload:
        """Sizes for `astraea_jax.flops`.

        Args:
          latents_shape: of one video: frames, rows, columns, channels.
          text_tokens: of a prompt.
        """
        tokens = self.geometry((1, *latents_shape)).num_tokens
        blocks = BlockSizes(
            number=self.config.num_layers,
            ffn_width=self.config.ffn_dim,
            text_tokens=text_tokens,
            keys=tokens,
        )
        return Workload(tokens, self.config.width, (blocks,))

    def geometry(self, latents_shape: tuple[int, ...]) -> core.Geometry:
        """Token grid for latents [B, F, H, W, C].

        Raises:
          Refusal: not five axes, other channels, or sizes that patches do not divide.
        """
        config = self.config
        problem = ListOf(Whole(0, 1 << 31), 0, 10).problem(latents_shape)
        if problem is not None:
            raise Refusal(f"the latents' shape {problem}")
        if len(latents_shape) != 5 or latents_shape[-1] != config.in_channels:
            raise Refusal(
                f"expected latents [B,F,H,W,{config.in_channels}]; got {tuple(latents_shape)}"
            )
        grid = []
        for size, patch in zip(latents_shape[1:4], config.patch_size, strict=True):
            if size % patch or not size:
                raise Refusal(
                    f"expected latent frames, height and width in multiples of "
                    f"{config.patch_size}; got {tuple(latents_shape[1:4])}"
                )
            grid.append(size // patch)
        if max(grid) > config.rope_max_seq_len:
            raise Refusal(
                f"expected at most {config.rope_max_seq_len} tokens along an axis (frames, height, "
                f"width); got {grid}: ask for fewer frames or pixels"
            )
        patch_values = int(np.prod(config.patch_size)) * config.out_channels
        frames, height, width = grid
        return core.Geometry(
            grid=(frames, height, width),
            width=config.width,
            patch_values=patch_values,
            stacks=(core.Stack(config.num_layers, (core.Kind(),)),),
            signals=(("embedding", config.width), ("projected", 6 * config.width)),
        )

    def prepare(self, conditions: Float[Array, "B M D"], geometry: core.Geometry) -> Prepared:
        """Text keys and values of every block, and the rotary tables: once a run.

        Args:
          conditions: text embeddings, padded to the model's text length.
          geometry: of the latents.

        Raises:
          Refusal: what is no such array.
        """
        width = self.config.text_dim
        checks.array("conditions", conditions, f"text embeddings [B,M,{width}]")
        if conditions.ndim != 3 or conditions.shape[-1] != width:
            raise Refusal(f"expected conditions [B,M,{width}]; got {tuple(conditions.shape)}")
        if not jnp.issubdtype(conditions.dtype, jnp.floating):
            raise Refusal(f"conditions must be text embeddings; got {conditions.dtype}")
        context = conditions.astype(self.text_1.kernel.dtype)
        text = self.text_2(jax.nn.gelu(self.text_1(context), approximate=True))

        def project(block: Block) -> KeysValues:
            attention = block.attn2
            keys = attention.split(attention.norm_k(attention.to_k(text)))
            return KeysValues(keys, attention.split(attention.to_v(text)))

        rope = rope_tables(geometry.grid, self.config.attention_head_dim)
        return Prepared(jax.vmap(project)(self.blocks), rope)

    def modulation(self, timestep: Float[Array, "B"], prepared: Prepared) -> TimeModulation:
        """Time embedding and its projection: the one feeds the head, the other the blocks."""
        del prepared
        return self.time(timestep)

    def time(self, timestep: Float[Array, "B"]) -> TimeModulation:
        """Embedding of the timestep: cosines first."""
        half = self.config.freq_dim // 2
        frequency = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
        angle = timestep.astype(jnp.float32)[:, None] * frequency[None]
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        embedding = self.time_2(jax.nn.silu(self.time_1(features)))
        projected = self.time_proj(jax.nn.silu(embedding))
        return TimeModulation(embedding, projected.reshape(-1, 6, self.config.width))

    def signals(self, modulation: TimeModulation) -> dict[str, Float[Array, "B D"]]:
        """The time embedding, and its projection to scales, shifts and gates."""
        flat = modulation.projected.reshape(len(modulation.projected), -1)
        return {"embedding": modulation.embedding, "projected": flat}

    def embed(
        self, latents: Float[Array, "B F Y X C"], prepared: Prepared
    ) -> tuple[Float[Array, "B N H"], tuple[()]]:
        """Patches, flattened as (frame, row, column, channel), projected to tokens."""
        del prepared
        return self.patches(latents), ()

    def patches(self, latents: Float[Array, "B F Y X C"]) -> Float[Array, "B N H"]:
        """Tokens of latents."""
        grid = self.geometry(latents.shape).grid
        steps = tuple(n for pair in zip(grid, self.config.patch_size, strict=True) for n in pair)
        x = latents.reshape(latents.shape[0], *steps, latents.shape[-1])
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(latents.shape[0], int(np.prod(grid)), -1)
        return self.patch_embedding(x.astype(self.patch_embedding.kernel.dtype)).astype(self.dtype)

    def layers(self, stack: int, prepared: Prepared) -> tuple[Block, KeysValues]:
        """Parameters and text of the blocks of the one stack."""
        del stack
        return self.blocks, prepared.text

    def bind(
        self,
        stack: int,
        layer: tuple[Block, KeysValues],
        prepared: Prepared,
        modulation: TimeModulation,
    ) -> tuple[BoundBlock]:
        """The one block of a layer."""
        del stack
        block, text = layer
        return (BoundBlock(block, text, prepared.rope, modulation.projected),)

    def head(
        self, tokens: Float[Array, "B N H"], modulation: TimeModulation
    ) -> Float[Array, "B N P"]:
        """Velocity of each patch, float32, flattened as (frame, row, column, channel)."""
        table = (
            self.scale_shift_table[...].astype(jnp.float32)[None] + modulation.embedding[:, None]
        )
        shift, scale = table[:, 0, None], table[:, 1, None]
        x = core.layer_norm(tokens, self.config.eps) * (1 + scale) + shift
        return self.proj_out(x)

    def unpatchify(
        self, patches: Float[Array, "B N P"], geometry: core.Geometry
    ) -> Float[Array, "B F Y X C"]:
        """Patches back to where they were cut from."""
        patch, channels = self.config.patch_size, self.config.out_channels
        x = patches.reshape(patches.shape[0], *geometry.grid, *patch, channels)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        sizes = (n * p for n, p in zip(geometry.grid, patch, strict=True))
        return x.reshape(patches.shape[0], *sizes, channels)


def with_policy(model: Transformer, dtype: DTypeLike) -> Transformer:
    """The model (or its template) with the dtype that each parameter has under its policy.

    Raises:
      Refusal: a dtype that no model can have.
    """
    checkpoints.float_dtype(dtype)

    def cast(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        wide = any(part.startswith(WIDE) for part in name.split("."))
        target = jnp.float32 if wide else dtype
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, target)
        return leaf.astype(target)

    return jax.tree_util.tree_map_with_path(cast, model)
