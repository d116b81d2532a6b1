"""What the JSON files of a whole Wan model say, checked before any weight is looked at."""

import os
from pathlib import Path
from typing import NamedTuple

from astraea_jax import checks, solvers
from astraea_jax.checks import Flag, ListOf, Number, OneOf, OrNone, Refusal, Text, Whole
from astraea_ports import checkpoints
from astraea_ports.checkpoints import configs
from astraea_ports.pipeline import plan
from astraea_ports.pipeline.parts import Defaults
from astraea_ports.pipeline.settings import read as settings_of
from astraea_ports.text import t5
from astraea_ports.text.tokenizer import stated_length
from astraea_ports.wan import family, vae_weights
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.vae import VAEConfig

TEXT_LENGTH = 512
"""Tokens that Wan reads; its tokenizer's own files may state no limit."""

ORIGINAL_SHIFT = 5.0
"""The original's flow shift for text-to-video; its advice for the 1.3B at 480p is 8."""

EXPERTS = ("high_noise_model", "low_noise_model")
"""Folders of the original layout of Wan 2.2's models of two experts."""

_ORIGINAL_KINDS = ("t2v", "i2v", "flf2v", "vace", "ti2v", "s2v", "animate")


DEFAULTS = Defaults(frames=81, height=480, width=832, steps=50, guidance=5.0)
"""The original's sampling, at the 1.3B's size."""


class Contents(NamedTuple):
    """What a model's files say of it.

    Attributes:
      tokenizer: folder of the tokenizer.
      text_length: tokens of a prompt, where the tokenizer's own config is not to say it.
      shift: the model's flow shift.
      grid: whose noise levels it is sampled on.
      defaults: of a call.
      dtype: that the weights run in, or None where only they themselves say it.
    """

    tokenizer: Path
    text_length: int | None
    shift: float
    grid: solvers.Grid
    defaults: Defaults
    dtype: str | None


def read(folder: Path) -> Contents:
    """Checks the JSON files of a model's folder, in either layout; they lie there already.

    Raises:
      Refusal: a file is missing or broken, a field is not as it must be, two parts don't fit each
        other, or it is another model of the family.
    """
    if is_original(folder):
        transformer = _transformer(folder)
        encoder = t5.T5Config.from_dict(t5.UMT5_XXL)
        image = VAEConfig.from_dict(vae_weights.WAN_VAE)
        tokenizer, grid, shift = folder / "google/umt5-xxl", "original", ORIGINAL_SHIFT
        length = checkpoints.read_config(folder).get("text_len")
        settings = settings_of(folder)
    else:
        check_index(folder)
        shift, settings = _shift(folder / "scheduler"), settings_of(folder)
        grid = settings.get("grid", "diffusers")
        transformer = _transformer(folder / "transformer")
        encoder, image = _encoder(folder / "text_encoder"), _image(folder / "vae")
        tokenizer, length = folder / "tokenizer", None
    _check_together(folder, transformer, encoder, image)
    # The original's config says it; else the tokenizer's own, where it states a limit.
    if stated_length(tokenizer) is None:
        length = length or TEXT_LENGTH
    said = {name: settings[name] for name in Defaults._fields if name in settings}
    defaults = DEFAULTS._replace(**said)
    found = Contents(tokenizer, length, shift, grid, defaults, settings.get("dtype"))
    if said:
        try:
            plan.check_size(defaults[:3], image, transformer.patch_size)
        except Refusal as error:
            raise Refusal(f"{folder / 'astraea.json'}: {error}") from error
    return found


def is_original(folder: Path) -> bool:
    """Whether a model's folder has the original layout, of any model of the family.

    Raises:
      Refusal: it is that of a model of two experts, or its config can't be read.
    """
    if os.path.lexists(folder / "model_index.json"):
        return False
    found = [name for name in EXPERTS if os.path.isdir(folder / name)]
    if found:
        raise Refusal(
            f"{folder} holds {' and '.join(found)}: this looks like Wan 2.2 A14B (two experts); "
            f"{family.RUNS}"
        )
    if not os.path.lexists(folder / "config.json"):
        return False
    config = checkpoints.read_config(folder)
    return "dim" in config and (
        config.get("_class_name") == "WanModel" or config.get("model_type") in _ORIGINAL_KINDS
    )


_ABSENT = OneOf((None, [None, None]))


def _component(library: str, *classes: str) -> OneOf:
    return OneOf(tuple([library, name] for name in classes))


_SCHEDULERS = (
    *("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
    "DPMSolverMultistepScheduler",
)

_INDEX = {
    "_class_name": OneOf(("WanPipeline",)),
    "transformer": _component("diffusers", "WanTransformer3DModel"),
    "vae": _component("diffusers", "AutoencoderKLWan"),
    "text_encoder": _component("transformers", "UMT5EncoderModel", "T5EncoderModel"),
    "tokenizer": ListOf(Text(200), 2, 2),
    "scheduler": _component("diffusers", *_SCHEDULERS),
    "transformer_2": _ABSENT,
    "boundary_ratio": configs.OFF,
    "expand_timesteps": OneOf((None, False)),
    "image_encoder": _ABSENT,
    "image_processor": _ABSENT,
}
"""The fields of model_index.json: of each part its library and class."""


def check_index(folder: Path) -> None:
    """Refuses a model_index.json that is of another model than Wan 2.1 text-to-video.

    Raises:
      Refusal: all the fields that say so, in one message.
    """
    values = checkpoints.read_config(folder, "model_index.json")
    # A part that is not known and not there is none.
    values = {key: value for key, value in values.items() if key in _INDEX or value != [None, None]}
    configs.read(
        values,
        _INDEX,
        name=str(folder / "model_index.json"),
        required=["_class_name"],
        advice=family.advice(values),
    )


_OFF = OneOf((False,))

_SCHEDULER = {
    "_class_name": OneOf(_SCHEDULERS),
    "flow_shift": Number(0.01, 100),
    "shift": Number(0.01, 100),
    "prediction_type": OneOf(("flow_prediction",)),
    "num_train_timesteps": OneOf((1000,)),
    "use_flow_sigmas": OneOf((True,)),
    "use_karras_sigmas": OneOf((None, False)),
    "use_exponential_sigmas": OneOf((None, False)),
    "use_beta_sigmas": OneOf((None, False)),
    "use_lu_lambdas": OneOf((None, False)),
    "use_dynamic_shifting": _OFF,
    "invert_sigmas": _OFF,
    "stochastic_sampling": _OFF,
    "thresholding": _OFF,
    "shift_terminal": configs.OFF,
    "sigma_min": configs.OFF,
    "sigma_max": configs.OFF,
    "final_sigmas_type": OneOf(("zero",)),
    "solver_order": OneOf((2,)),
    "solver_type": OneOf(("bh2", "midpoint")),
    "algorithm_type": OneOf(("dpmsolver++",)),
    "solver_p": configs.OFF,
    "predict_x0": OneOf((True,)),
    "lower_order_final": OneOf((True,)),
    "euler_at_final": _OFF,
    "disable_corrector": OneOf(([],)),
    # What the noise levels of a flow do not depend on, or what is off as above.
    "beta_start": Number(0, 1),
    "beta_end": Number(0, 1),
    "beta_schedule": OneOf(("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": configs.OFF,
    "rescale_betas_zero_snr": Flag(),
    "timestep_spacing": OneOf(("linspace", "leading", "trailing")),
    "steps_offset": Whole(0, 1000),
    "dynamic_thresholding_ratio": Number(0, 1),
    "sample_max_value": Number(0, 1e6),
    "time_shift_type": OneOf(("exponential", "linear")),
    "base_shift": OrNone(Number(0, 100)),
    "max_shift": OrNone(Number(0, 100)),
    "base_image_seq_len": OrNone(Whole(1, 1 << 20)),
    "max_image_seq_len": OrNone(Whole(1, 1 << 20)),
    "lambda_min_clipped": checks.Anything(),
    "variance_type": checks.Anything(),
}
"""The fields of scheduler_config.json, of three classes; what its solvers do, ours do."""


def _shift(folder: Path) -> float:
    """The flow shift of a scheduler that samples as the solvers here do."""
    name = "scheduler_config.json"
    values = configs.read(
        checkpoints.read_config(folder, name), _SCHEDULER, name=str(folder / name)
    )
    given = {values[key] for key in ("flow_shift", "shift") if key in values}
    if len(given) > 1:
        raise Refusal(
            f"{folder / name}: flow_shift and shift must not differ; got {values['flow_shift']} "
            f"and {values['shift']}; take one of them out"
        )
    return float(given.pop()) if given else 1.0


def _transformer(folder: Path) -> TransformerConfig:
    values = checkpoints.read_config(folder)
    return TransformerConfig.from_dict(values, name=str(folder / "config.json"))


def _encoder(folder: Path) -> t5.T5Config:
    values = checkpoints.read_config(folder, expected=("umt5", "t5"))
    return t5.T5Config.from_dict(values, name=str(folder / "config.json"))


def _image(folder: Path) -> VAEConfig:
    values = checkpoints.read_config(folder)
    return VAEConfig.from_dict(values, name=str(folder / "config.json"))


def _check_together(
    folder: Path, transformer: TransformerConfig, encoder: t5.T5Config, image: VAEConfig
) -> None:
    """Refuses parts that don't fit each other."""
    problems = []
    if transformer.in_channels != image.latent_channels:
        problems.append(
            f"the transformer's in_channels must be the VAE's z_dim ({image.latent_channels}); "
            f"got {transformer.in_channels}"
        )
    if transformer.text_dim != encoder.d_model:
        problems.append(
            f"the transformer's text_dim must be the text encoder's d_model ({encoder.d_model}); "
            f"got {transformer.text_dim}"
        )
    checks.refuse(str(folder), problems, "the parts are of different models: fetch it again")
