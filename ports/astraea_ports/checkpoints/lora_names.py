"""The names of a LoRA file's tensors, in the spellings that files have.

A key is a prefix, the weight's own key in Diffusers' layout or the original one, and what the
tensor is; kohya's keys have underscores for the dots between.

Source: Diffusers `loaders/lora_conversion_utils.py`, PEFT `utils/save_and_load.py`, and the
converters of musubi-tuner, VideoX-Fun, DiffSynth-Studio and LightX2V.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

PREFIXES = (
    *("base_model.model.", "diffusion_model.", "transformer.", "model.", "pipe.dit.", "dit."),
    *("module.", "_orig_mod."),
)
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")

# PEFT puts an adapter's name, "default" or the user's own, before what the tensor is.
_ADAPTER = r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?"
_DOWN, _UP = r"(?:lora_A|lora_down|lora\.down)", r"(?:lora_B|lora_up|lora\.up)"
_KINDS = (
    (re.compile(rf"(?P<module>.+)\.{_DOWN}{_ADAPTER}(?:\.weight)?"), "down"),
    (re.compile(rf"(?P<module>.+)\.{_UP}{_ADAPTER}(?:\.weight)?"), "up"),
    (re.compile(rf"(?P<module>.+)\.{_UP}{_ADAPTER}\.bias"), "up_b"),
    (re.compile(r"(?P<module>.+)\.alpha"), "alpha"),
    (re.compile(r"(?P<module>.+)\.diff"), "diff"),
    (re.compile(r"(?P<module>.+)\.diff_b"), "diff_b"),
    (re.compile(r"(?P<module>.+)\.diff_m"), "diff_m"),
)

_OTHERS = (
    (
        r"dora_scale|lora_magnitude_vector",
        "a DoRA, which also rescales the weights",
    ),
    (r"\.lokr_", "a LoKr, whose changes are Kronecker products"),
    (r"\.hada_", "a LoHa, whose changes are Hadamard products"),
    (r"\.(oft|boft|vera|randlora)_|\.[ab][12]\.weight$|\.lora_mid", "an adapter that is no LoRA"),
)
_NOT_ALONE = (
    (r"lora_te|text_encoder", "a LoRA of a text encoder too"),
    (r"^(?!.*lora).*\.(weight|bias)$", "whole weights, no changes to them"),
)


class Words(NamedTuple):
    """What the names of a model's modules are made of.

    Attributes:
      compound: words that hold an underscore themselves: kohya's keys lose the difference.
      whole: modules that are a parameter themselves, with no weight in them.
      others: patterns of keys of other models of the family, and what such a file is.
      size: what a message calls a model that a file must be made for.
    """

    compound: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    size: str = "this model"


_PLAIN = Words()


class Name(NamedTuple):
    """What a tensor's name says.

    Attributes:
      module: whose weight or bias it changes: its name in the model, dots between the parts.
      kind: "down", "up", "alpha", "diff" (of a weight), "up_b" or "diff_b" (of a bias).
      adapter: PEFT's name of the adapter; None where there is none.
    """

    module: str
    kind: str
    adapter: str | None


def weight_of(module: str, words: Words) -> str:
    """The key of a module's weight."""
    return module if module.rpartition(".")[2] in words.whole else f"{module}.weight"


def parse(key: str, words: Words) -> Name | None:
    """What a key says; None if it is none of a LoRA's."""
    for regex, kind in _KINDS:
        match = regex.fullmatch(key)
        if match:
            module, adapter = bare(match["module"], words), match.groupdict().get("adapter")
            if kind == "diff_m":  # LightX2V's word for the difference of a modulation
                module, kind = f"{module}.modulation", "diff"
            return Name(module, kind, adapter)
    return None


def bare(name: str, words: Words = _PLAIN) -> str:
    """A module's name without prefixes, dots between its parts."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    prefix = next((prefix for prefix in _UNDERSCORED if name.startswith(prefix)), "")
    if not prefix:
        return name
    name = name.removeprefix(prefix).removeprefix("_")
    for word in words.compound:
        name = re.sub(rf"(?<![a-z]){word}(?![a-z\d])", word.replace("_", "-"), name)
    return name.replace("_", ".").replace("-", "_")


def other_kind(keys: Iterable[str], words: Words) -> str | None:
    """What a file is whose keys these are, if it is known and no LoRA of this model."""
    keys = list(keys)
    for pattern, kind in (*_OTHERS, *words.others, *_NOT_ALONE):
        if any(re.search(pattern, key) for key in keys):
            return kind
    return None
