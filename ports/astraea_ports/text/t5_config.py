"""Sizes of the encoders of T5 and UMT5, and the fields of their config.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from astraea_jax import checks
from astraea_jax.checks import Flag, ListOf, Number, OneOf, OrNone, Refusal, Text, Whole
from astraea_ports.checkpoints import configs

UMT5_XXL: Mapping[str, Any] = {
    "model_type": "umt5",
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
"""What config.json says of the encoder of both sizes of Wan."""


_SIZES = {
    "vocab_size": Whole(1, 1 << 21),
    "d_model": Whole(1, configs.WIDEST),
    "d_kv": Whole(1, configs.WIDEST),
    "d_ff": Whole(1, 4 * configs.WIDEST),
    "num_layers": Whole(1, configs.LAYERS),
    "num_heads": Whole(1, 1024),
}

_DTYPE = OneOf(("float32", "bfloat16", "float16", "float64", "auto"))

_RULES = _SIZES | {
    "model_type": OneOf(("umt5", "t5")),
    "relative_attention_num_buckets": Whole(4, 1024),
    "relative_attention_max_distance": Whole(2, 1 << 20),
    "layer_norm_epsilon": configs.EPSILON,
    "shared_position_bias": Flag(),
    # The MLP of T5 v1.1 and UMT5; that of the first T5 is another.
    "feed_forward_proj": OneOf(("gated-gelu",)),
    "dense_act_fn": OneOf(("gelu_new",)),
    "is_gated_act": OneOf((True,)),
    "is_decoder": OneOf((False,)),
    "quantization_config": configs.OFF,
    # Of the decoder, of training and of other programs.
    "num_decoder_layers": OrNone(Whole(0, configs.LAYERS)),
    "dropout_rate": Number(0, 1),
    "classifier_dropout": Number(0, 1),
    "initializer_factor": Number(0, 1000),
    "is_encoder_decoder": Flag(),
    "tie_word_embeddings": Flag(),
    "scalable_attention": Flag(),
    "output_past": Flag(),
    "use_cache": Flag(),
    "pad_token_id": OrNone(Whole(-1, 1 << 21)),
    "eos_token_id": OrNone(Whole(-1, 1 << 21)),
    "decoder_start_token_id": OrNone(Whole(-1, 1 << 21)),
    "architectures": OrNone(ListOf(Text(), 0, 10)),
    "tokenizer_class": OrNone(Text()),
    "torch_dtype": OrNone(_DTYPE),
    "dtype": OrNone(_DTYPE),
    "transformers_version": OrNone(Text()),
}
"""The fields of config.json. Transformers' own are many more, and let through."""


@dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder; the names are those of transformers' config.json.

    Attributes:
      shared_position_bias: one table of relative positions for all layers (T5), not one for
        each (UMT5).

    Raises:
      Refusal: a size out of range or at odds with another; all of it in one message.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    shared_position_bias: bool = False

    def __post_init__(self):
        advice = "give sizes that an encoder can have"
        checks.fields(asdict(self), _RULES, name="sizes", advice=advice)
        checks.refuse("sizes", self._problems(), advice)

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], *, name: str = "the text encoder's config"
    ) -> "T5Config":
        """Reads a config.json.

        Args:
          config: what the file holds.
          name: of the file, for the message.

        Raises:
          Refusal: a size is missing, out of range or at odds with another, or the kind of model or
            of MLP is another than this file's; all of it in one message.
        """
        values = configs.read(config, _RULES, name=name, required=tuple(_SIZES), others=True)
        known = {field.name for field in fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known}
        shared = values.get("model_type", "umt5") == "t5"
        if values.get("shared_position_bias", shared) != shared:
            problem = f"shared_position_bias must be {shared} for this model_type"
            checks.refuse(name, [problem], "mend the file or fetch it again")
        try:
            return cls(**chosen | {"shared_position_bias": shared})
        except Refusal as error:
            raise Refusal(f"{name}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        return {"model_type": "t5" if self.shared_position_bias else "umt5"} | asdict(self)

    def _problems(self) -> list[str]:
        """What is wrong with the sizes together."""
        inner, problems = self.num_heads * self.d_kv, []
        if inner > configs.WIDEST:
            problems.append(f"num_heads x d_kv must be at most {configs.WIDEST}; got {inner}")
        exact = self.relative_attention_num_buckets // 4
        if self.relative_attention_max_distance <= exact:
            problems.append(
                "relative_attention_max_distance must be above a quarter of "
                f"relative_attention_num_buckets ({exact}), the distances with a bucket of their "
                f"own; got {self.relative_attention_max_distance}"
            )
        block = self.d_model * (4 * inner + 3 * self.d_ff)
        total = self.num_layers * block + self.vocab_size * self.d_model
        return [*problems, *configs.too_many(total)]
