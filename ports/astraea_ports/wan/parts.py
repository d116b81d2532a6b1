"""The parts of a Wan model, found and checked before any weight is read; or made of random ones."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from astraea_jax import checks, solvers
from astraea_jax.checks import Refusal
from astraea_ports import checkpoints, t5, tiny
from astraea_ports.checkpoints import Loadable
from astraea_ports.wan import contents, transformer_weights, vae, vae_weights
from astraea_ports.wan import lora as lora_files
from astraea_ports.wan.config import CONFIGS
from astraea_ports.wan.contents import ORIGINAL_SHIFT, TEXT_LENGTH, Defaults
from astraea_ports.wan.text import Tokenizer
from astraea_ports.wan.transformer import Precision, Transformer, with_policy

SHIPPED = {"tiny": tiny.FOLDER}
"""Models inside the package, by name."""


class Parts(NamedTuple):
    """What a model is made of, not loaded yet.

    Attributes:
      tokenizer: text to ids.
      text_encoder: ids to embeddings.
      transformer: the denoiser.
      vae: latents to pixels.
      shift: the model's flow shift.
      grid: whose noise levels it is sampled on.
      defaults: of a call.
      text_name: stands for the text encoder's weights, where embeddings are kept.
      large: whether parts are loaded for their stage, unless told.
      folder: where the model lies; None for one of random weights.
    """

    tokenizer: Tokenizer
    text_encoder: Loadable[t5.T5Encoder]
    transformer: Loadable[Transformer]
    vae: Loadable[vae.VAE]
    shift: float
    grid: solvers.Grid
    defaults: Defaults
    text_name: str
    large: bool
    folder: Path | None = None


def open_parts(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    precision: Precision = "reference",
    lora: Sequence[lora_files.Lora] = (),
    revision: str | None = None,
) -> Parts:
    """Finds the parts of a model in either layout and holds their headers against their configs.

    Of a model of the hub the JSON files are fetched first: what does not run here is refused by
    them alone, and of what does the weights that are read, and no others.

    Args:
      source: a folder, a hub id, or a model that ships.
      dtype: of the transformer and the text encoder; None is the folder's own, see `own_dtype`.
      precision: what the transformer leaves in float32.
      lora: files of low-rank changes to the transformer.
      revision: of a hub id: a branch, a tag or a commit.

    Raises:
      Refusal: no such model, or a part that is missing, broken, or of another kind.
    """
    lora = lora_files.check(lora)  # before a model is fetched
    if dtype is not None:
        checkpoints.float_dtype(dtype)
    model = checkpoints.find_model(
        SHIPPED.get(checkpoints.as_source(source), source), revision=revision
    )
    found = contents.read(model.path)
    model.fetch(f"{found.tokenizer.relative_to(model.path).as_posix()}/tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(found.tokenizer, length=found.text_length)
    text_encoder = t5.open_text_encoder(model)
    transformer = transformer_weights.open_transformer(model, precision=precision, lora=lora)
    image = vae_weights.open_vae(model)
    large = is_large(text_encoder, transformer, image)
    if dtype is None:
        dtype = found.dtype or own_dtype(checkpoints.stored_dtype(transformer), large)
    text_encoder = checkpoints.retyped(
        text_encoder, checkpoints.with_dtype(text_encoder.template, dtype)
    )
    return Parts(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=checkpoints.retyped(transformer, with_policy(transformer.template, dtype)),
        vae=image,
        shift=found.shift,
        grid=found.grid,
        defaults=found.defaults,
        text_name=checkpoints.fingerprint(text_encoder),
        large=large,
        folder=model.path,
    )


LARGE = 500_000_000
"""Parameters of a large model: its parts are loaded for their stage, unless told."""


def is_large(*parts: Loadable) -> bool:
    """Whether parts together have more than `LARGE` parameters, by their shapes."""
    leaves = jax.tree.leaves([part.template for part in parts])
    return sum(math.prod(leaf.shape) for leaf in leaves) > LARGE


def own_dtype(stored: str, large: bool) -> str:
    """The dtype that a model runs in where neither the call nor its astraea.json says one.

    That of its transformer's weights, with two exceptions. A large model of float32 weights runs in
    bfloat16: the originals keep float32 on disk and run bfloat16, and few devices hold the other.
    And float16 runs nowhere here: a small model of it runs in float32, which holds the same
    numbers.
    """
    return "bfloat16" if large or stored == "bfloat16" else "float32"


def main_dtype(transformer: Transformer) -> str:
    """NumPy's name of the dtype that the large products of a transformer have."""
    return max(jax.tree.leaves(transformer), key=lambda leaf: leaf.size).dtype.name


def random_parts(size: str, *, dtype: DTypeLike, precision: Precision, seed: int) -> Parts:
    """A model of a real size with random weights; its text encoder is a small stand-in.

    Raises:
      Refusal: an unknown size.
    """
    if not isinstance(size, str) or size not in CONFIGS:
        raise Refusal(f"size must be one of {', '.join(CONFIGS)}; got {checks.shown(size)}")
    checks.whole("seed", seed, 0, 2**31 - 1)
    checkpoints.float_dtype(dtype)
    config = CONFIGS[size]
    small = t5.T5Config.from_dict(
        {"vocab_size": 1024, "d_model": config.text_dim, "d_kv": 64, "d_ff": 64}
        | {"num_layers": 1, "num_heads": 1}
    )
    template = jax.eval_shape(lambda: t5.T5Encoder(small, nnx.Rngs(0)))
    parsed = vae.VAEConfig.from_dict(vae_weights.WAN_VAE)
    transformer = transformer_weights.transformer_template(config, dtype=dtype, precision=precision)
    loadables = (
        RandomWeights(checkpoints.with_dtype(template, dtype), seed),
        RandomWeights(transformer, seed + 1),
        RandomWeights(jax.eval_shape(lambda: vae.VAE(parsed, nnx.Rngs(0))), seed + 2),
    )
    return Parts(
        tokenizer=Tokenizer.from_pretrained(tiny.FOLDER / "tokenizer", length=TEXT_LENGTH),
        text_encoder=loadables[0],
        transformer=loadables[1],
        vae=loadables[2],
        shift=ORIGINAL_SHIFT,
        grid="original",
        defaults=Defaults(),
        text_name=f"random {seed}",
        large=is_large(*loadables),
    )


class RandomWeights[M](NamedTuple):
    """A module that is made, leaf by leaf, of random numbers of a sane scale."""

    template: M
    seed: int

    def load(self) -> M:
        """The module: norms are 1, biases 0, and a product keeps the size of what goes in."""
        key, arrays = jax.random.key(self.seed), []
        for index, (path, slot) in enumerate(checkpoints.parameter_shapes(self.template).items()):
            value = _random(jax.random.fold_in(key, index), path, slot)
            arrays.append(jax.block_until_ready(value))  # one at a time: their scratch space is
        return jax.tree.unflatten(jax.tree.structure(self.template), arrays)


def _random(key, path: str, slot: jax.ShapeDtypeStruct) -> jax.Array:
    name = path.rsplit(".", 1)[-1]
    if name == "bias":
        return jnp.zeros(slot.shape, slot.dtype)
    own = slot.shape[1:] if path.startswith("blocks.") else slot.shape
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
