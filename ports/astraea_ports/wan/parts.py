"""The parts of a Wan model, found and checked before any weight is read; or made of random ones."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from astraea_jax import checks
from astraea_ports import checkpoints, tiny
from astraea_ports.checkpoints import Precision
from astraea_ports.checkpoints import lora as lora_files
from astraea_ports.pipeline import parts
from astraea_ports.pipeline.parts import Parts
from astraea_ports.pipeline.random_weights import RandomWeights
from astraea_ports.text import t5
from astraea_ports.text.tokenizer import Tokenizer
from astraea_ports.wan import contents, transformer_weights, vae, vae_weights
from astraea_ports.wan.config import CONFIGS
from astraea_ports.wan.contents import DEFAULTS, ORIGINAL_SHIFT, TEXT_LENGTH
from astraea_ports.wan.transformer import with_policy

_INDEX = {"_class_name": "WanPipeline"}

_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


def open_parts(
    source: checkpoints.Source,
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
    model = checkpoints.find_model(source, revision=revision)
    found = contents.read(model.path)
    model.fetch(f"{found.tokenizer.relative_to(model.path).as_posix()}/tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(found.tokenizer, length=found.text_length)
    text_encoder = t5.open_text_encoder(model)
    transformer = transformer_weights.open_transformer(model, precision=precision, lora=lora)
    image = vae_weights.open_vae(model)
    large = parts.is_large(text_encoder, transformer, image)
    if dtype is None:
        stored = checkpoints.stored_dtype(transformer)
        dtype = found.dtype or parts.own_dtype(stored, large)
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
        index=_INDEX,
        scheduler=_SCHEDULER | {"flow_shift": found.shift},
        folder=model.path,
    )


def random_parts(size: str, *, dtype: DTypeLike, precision: Precision, seed: int) -> Parts:
    """A model of a real size with random weights; its text encoder is a small stand-in.

    Raises:
      Refusal: an unknown size.
    """
    checks.one_of("size", size, tuple(CONFIGS))
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
        defaults=DEFAULTS,
        text_name=f"random {seed}",
        large=parts.is_large(*loadables),
        index=_INDEX,
        scheduler=_SCHEDULER | {"flow_shift": ORIGINAL_SHIFT},
    )
