"""Which model a command means."""

import dataclasses
import os
import pathlib
from typing import Literal

import jax.numpy as jnp

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_ports import wan
from astraea_ports.wan import embeddings, lora

SIZES = {"wan": "1.3B", "wan-14b": "14B"}
"""Names of models without weights of their own, and the size that `--random` makes of them."""

Dtype = Literal["float32", "bfloat16"]
Precision = Literal["reference", "fast"]


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """A model as the options name it.

    Attributes:
      model: "tiny", "wan", "wan-14b", a folder, or a hub id.
      checkpoint: folder or hub id of the weights of "wan" or "wan-14b".
      random: random weights of its size instead.
      dtype: of the weights; None is bfloat16 for those two, as the original runs, else float32.
      precision: what stays float32 where `dtype` is narrower.
      lora: files of low-rank changes, each with `:strength` or without.
      staged: whether parts are loaded for their stage only.
    """

    model: str = "tiny"
    checkpoint: pathlib.Path | None = None
    random: bool = False
    dtype: Dtype | None = None
    precision: Precision = "reference"
    lora: tuple[str, ...] = ()
    staged: bool = False

    @property
    def weights_dtype(self) -> Dtype:
        """The dtype, filled in."""
        return self.dtype or ("bfloat16" if self.model in SIZES else "float32")

    def open(self) -> wan.Pipeline:
        """The pipeline.

        Raises:
          Refusal: options that contradict each other, or no such model.
        """
        dtype = jnp.dtype(self.weights_dtype)
        if self.random:
            if self.checkpoint is not None or self.lora or self.model not in SIZES:
                raise Refusal(
                    "--random makes weights for --model wan or wan-14b: it takes no --checkpoint "
                    f"and no --lora; got --model {self.model}"
                )
            size = SIZES[self.model]
            return wan.Pipeline.random(
                size, dtype=dtype, precision=self.precision, staged=self.staged
            )
        return wan.Pipeline.from_pretrained(
            self.source(),
            dtype=dtype,
            precision=self.precision,
            lora=[read_lora(text) for text in self.lora],
            staged=self.staged,
            text_cache=embeddings.cache_folder() if self.staged else None,
        )

    def source(self) -> str:
        """Where the weights are."""
        if self.model in SIZES:
            if self.checkpoint is None:
                raise Refusal(
                    f"--model {self.model} needs weights: add --checkpoint FOLDER (or a hub id), "
                    "or --random"
                )
            return os.fspath(self.checkpoint)
        if self.checkpoint is not None:
            raise Refusal(
                f"--checkpoint belongs to --model wan; got --model {self.model}: leave one out"
            )
        return self.model


def read_lora(text: str) -> wan.Lora:
    """`file.safetensors` or `file.safetensors:0.8`.

    Raises:
      Refusal: a strength that is no number in -100..100.
    """
    file, colon, strength = text.rpartition(":")
    # A colon may be the name's own, as in C:\\file.safetensors.
    if not colon or not file.lower().endswith(".safetensors"):
        return wan.Lora(text)
    try:
        value = float(strength)
    except ValueError:
        value = strength
    low, high = -lora.STRONGEST, lora.STRONGEST
    return wan.Lora(file, checks.number(f"strength of {file}", value, low, high))
